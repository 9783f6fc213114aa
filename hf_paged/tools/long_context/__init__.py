"""Tasks over long contexts, answered from several caches side by side.

The claim is that all caches give the same answers; the score says how good these are, which is up to the model.
"""

from hf_paged.tools.long_context.evaluation import TASKS, Settings, evaluate_long_context

__all__ = ["TASKS", "Settings", "evaluate_long_context"]
