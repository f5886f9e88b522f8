"""Methods that remove groups of heads and neurons."""
