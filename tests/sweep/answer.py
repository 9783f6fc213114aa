"""A worker's answers about one class."""

import gc
from collections.abc import Iterator
from typing import Any

import torch

from tests.sweep.checks import ask_oracle, check, judged
from tests.sweep.features import features
from tests.sweep.subjects import subject_of


def answers(name: str, kind: str, modes: list[str]) -> Iterator[dict[str, Any]]:
    """First what the oracle makes of it, then one answer for each mode; only the first if it can't be made."""
    try:
        subject = subject_of(name, kind)
        has = features(subject.load(subject.attention))
    except Exception as error:
        finding = judged(error)
        yield {"not built": finding.message, "where": finding.where}
        return
    ask_oracle(subject, modes)
    varied = [{int(logits[0].argmax()) for logits in found.logits} for found in subject.expected.values()]
    yield {
        "has": has,
        "attention": subject.attention,
        "cases": list(subject.expected),
        "refused by DynamicCache": subject.refused,
        "distinct tokens": max(map(len, varied), default=0),
    }
    for mode in modes:
        yield {case: finding.as_json() for case, finding in check(subject, mode).items()}
        if mode == "compiled":
            torch._dynamo.reset()
            gc.collect()
