"""Runs and comparisons as one HTML page that needs nothing else: gathered from folders, drawn, written."""
