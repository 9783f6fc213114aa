"""No cache: what a token costs when everything before it is computed again."""

from typing import Any

from hf_paged.tools.bench.baselines import line_up
from hf_paged.tools.bench.race import race_once, summarize, warm_up
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.progress import progress
from hf_paged.tools.lab.subject import Subject

CONTEXTS = (128, 512, 1024)
BASELINES = ("dynamic", "no-cache")
_NUM_STEPS = 5  # a step is a whole prompt; more would tell no more


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure one row at each context.

    Returns:
        `rows` for each context and baseline.
    """
    num_new = min(settings.max_new_tokens, 1 + _NUM_STEPS)
    rows = []
    with line_up(subject.model, settings.baselines or BASELINES, settings.page_size) as baselines:
        warm_up(baselines, subject)
        for context in progress(subject.contexts(settings.contexts, CONTEXTS, num_new), "no-cache"):
            ids = subject.prompt(context)
            laps = [race_once(baselines, ids, None, num_new) for _ in range(settings.rounds)]
            rows += [{"context": context} | row for row in summarize(laps)]
    return {"rows": rows}
