"""Metrics that `evaluate.load` takes by their path: `evaluate.load(PAGED_PERPLEXITY)`."""

from pathlib import Path

__all__ = ["PAGED_PERPLEXITY"]

PAGED_PERPLEXITY = str(Path(__file__).parent / "paged_perplexity")
"""Perplexity of texts under a model, as evaluate's own `perplexity`, computed through a paged cache."""
