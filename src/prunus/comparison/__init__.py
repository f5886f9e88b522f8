"""Many recipes, one table: a grid is spelt out, each recipe is run and judged once, results are set side by side."""
