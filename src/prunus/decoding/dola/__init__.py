"""DoLa: the next token by what the last layer knows and an inner one does not (Chuang et al. 2023)."""
