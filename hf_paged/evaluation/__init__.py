"""What a cache does to a model's results, and to memory."""
