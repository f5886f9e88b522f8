"""A language model as estimator of the Markov kernel of a series of numbers that it reads in context."""
