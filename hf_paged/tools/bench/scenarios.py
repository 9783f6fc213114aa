"""The scenarios by name."""

from collections.abc import Callable
from typing import Any

from hf_paged.tools.bench import (
    allocator,
    beam,
    chat,
    compile,
    fork,
    latency,
    mixed,
    no_cache,
    page_size,
    plan,
    profile,
    single,
)
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.subject import Subject

WITH_MODEL: dict[str, Callable[[Subject, Settings], dict[str, Any]]] = {
    "latency": latency.measure,
    "single": single.measure,
    "mixed": mixed.measure,
    "chat": chat.measure,
    "beam": beam.measure,
    "fork": fork.measure,
    "no-cache": no_cache.measure,
    "page-size": page_size.measure,
    "profile": profile.measure,
}
"""Scenarios that are given a model."""

WITHOUT_MODEL: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "allocator": allocator.measure,
    "plan": plan.measure,
    "compile": compile.measure,
}
"""Scenarios without a model, or whose processes load their own."""

DESCRIPTIONS = {
    name: (measure.__globals__["__doc__"] or "").partition("\n")[0]
    for name, measure in (WITH_MODEL | WITHOUT_MODEL).items()
}
"""A line about each."""
