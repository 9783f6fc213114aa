"""The folder that `evaluate.load` reads `paged_perplexity.py` from."""
