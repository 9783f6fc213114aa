"""Single: one long sequence, up to 100,000 tokens where the model allows, its prompt run in chunks."""

from typing import Any

from hf_paged.tools.bench.growing import grow, subjects
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.subject import Subject

CONTEXTS = (1000, 4000, 8000, 16000, 32000, 64000, 100000)


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure along the way; beyond the model's positions, with a tiny random one.

    Returns:
        `rows` for each model, context and baseline, as `grow` gives them.
    """
    return {
        "rows": [
            row
            for model, contexts in subjects(subject, settings, CONTEXTS)
            for row in grow(model, settings, "single", contexts, settings.chunk_size)
        ]
    }
