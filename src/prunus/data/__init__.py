"""Texts and token ids: read from anywhere, cut into samples, seeded and hashed."""
