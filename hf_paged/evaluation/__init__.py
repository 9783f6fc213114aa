"""What a cache does to a model's results, and to memory."""

from hf_paged.evaluation.perplexity import CacheFigures, Perplexity, perplexity

__all__ = ["CacheFigures", "Perplexity", "perplexity"]
