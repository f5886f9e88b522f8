"""The packed format: what was kept of a pruned model, and nothing else. See docs/packed-format.md."""
