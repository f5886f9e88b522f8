"""Models as they lie on disk and as transformers builds them; no file here knows a family by name."""
