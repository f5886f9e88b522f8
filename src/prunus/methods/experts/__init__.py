"""Methods that remove whole experts of a mixture."""
