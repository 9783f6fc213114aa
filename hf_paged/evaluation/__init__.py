"""Whether a model says the same through every cache."""
