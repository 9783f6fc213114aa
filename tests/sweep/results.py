"""The results of a sweep, kept as JSON."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_paged
from tests.sweep.checks import Outcome

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results" / "families.json"
ORDER = list(Outcome)


class Results:
    """One entry for each class; saved after each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, str] = {}
        if path.exists():
            whole = json.loads(path.read_text())
            self.models, self.versions = whole["models"], whole["versions"]

    def keep(self, names: Iterable[str]) -> None:
        """Forget classes that aren't among these."""
        self.models = {name: entry for name, entry in self.models.items() if name in set(names)}

    def missing(self, name: str, modes: list[str]) -> list[str]:
        """Those of the modes in which a class has no result."""
        entry = self.models.get(name, {})
        return [mode for mode in modes if mode not in entry.get("modes", {})]

    def add(self, name: str, known: tuple[str, str], what: str, answer: dict[str, Any]) -> None:
        entry = self.models.setdefault(name, {})
        entry |= {"kind": known[0], "model_type": known[1]}
        if what == "oracle":
            if "not built" in answer:
                entry.pop("modes", None)
            else:
                entry.pop("not built", None)
                entry.pop("where", None)
                answer["cases"] = [*dict.fromkeys(entry.get("cases", []) + answer["cases"])]
                answer["refused by DynamicCache"] |= entry.get("refused by DynamicCache", {})
            entry |= answer
        else:
            entry.setdefault("modes", {})[what] = answer
        self.save()

    def add_failure(self, name: str, known: tuple[str, str], todo: list[str], message: str) -> None:
        finding = {"outcome": str(Outcome.STUCK), "message": message}
        if todo[0] == "oracle":
            self.add(name, known, "oracle", {"not built": f"the oracle: {message}"})
        else:
            self.add(name, known, todo[0], {"all": finding})

    def line(self, name: str) -> str:
        entry = self.models[name]
        if "not built" in entry:
            return f"{name}: not built: {entry['not built'][:120]}"
        parts = [f"{mode}: {worst(found)}" for mode, found in entry.get("modes", {}).items()]
        return f"{name} [{','.join(entry['cases'])}] {entry['distinct tokens']} | " + " | ".join(parts)

    def save(self) -> None:
        """Write everything, one line for each class."""
        self.versions = {
            "hf-paged": hf_paged.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        lines = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in sorted(self.models.items()))
        head = f'"command": "python -m tests.sweep",\n"versions": {json.dumps(self.versions)}'
        text = f'{{{head},\n"models": {{\n{lines}\n}}}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(self.path)


def worst(found: dict[str, Any]) -> str:
    """The worst outcome of the cases of a mode; "nothing to compare" without any."""
    outcomes = [finding if isinstance(finding, str) else finding["outcome"] for finding in found.values()]
    return max(outcomes, key=ORDER.index) if outcomes else "nothing to compare"
