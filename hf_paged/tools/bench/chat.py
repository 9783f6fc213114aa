"""Chat: a conversation that grows turn by turn, each turn adding to the cache of the last."""

from typing import Any

from hf_paged.tools.bench.growing import grow, subjects
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.subject import Subject

CONTEXTS = (1000, *range(2000, 32001, 2000))


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure every turn; beyond the model's positions, with a tiny random one.

    Returns:
        `rows` for each model, turn and baseline, as `grow` gives them: `context` is the length of the conversation
        when the answer begins, and `first_token_s` the time to read what was said since the last answer.
    """
    return {
        "rows": [
            row
            for model, contexts in subjects(subject, settings, CONTEXTS)
            for row in grow(model, settings, "chat", contexts, None)
        ]
    }
