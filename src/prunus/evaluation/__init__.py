"""Measures of a checkpoint on disk: perplexity, a sentence, bytes. Nothing here knows of pruning."""
