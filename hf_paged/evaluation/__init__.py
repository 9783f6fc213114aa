"""What a cache does to a model's answers."""
