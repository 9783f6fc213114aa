"""What a cache does to a model's results, and to memory."""

from hf_paged.tools.evaluation.audit import AuditStep, MemoryAudit
from hf_paged.tools.evaluation.perplexity import CacheFigures, Perplexity, perplexity

__all__ = ["AuditStep", "CacheFigures", "MemoryAudit", "Perplexity", "perplexity"]
