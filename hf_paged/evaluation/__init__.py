"""Whether a model says the same through every cache."""

from hf_paged.evaluation.perplexity import CacheFigures, Perplexity, perplexity

__all__ = ["CacheFigures", "Perplexity", "perplexity"]
