"""Low rank: a matrix becomes the product of two thin ones."""
