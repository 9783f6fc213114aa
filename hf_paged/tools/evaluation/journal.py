"""Finished batches on disk, so that an interrupted run can go on."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged.tools.evaluation.scoring import Score
from hf_paged.tools.evaluation.windows import Window

Scores = dict[str, Score]

_IRRELEVANT = ("_name_or_path", "_attn_implementation", "transformers_version")
_TABLES = ("run (name TEXT PRIMARY KEY, value TEXT)", "batches (number INTEGER PRIMARY KEY, scores TEXT)")


class Journal:
    """An SQLite file of scores, which all processes of a run write to.

    Args:
        path: of the file, which is made, or gone on with.
        fingerprint: what determines the scores, by name.

    Raises:
        ValueError: if the file belongs to another run, or is no journal.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any]) -> None:
        asked = {name: json.dumps(value) for name, value in fingerprint.items()}
        self._file = sqlite3.connect(
            path, timeout=60, isolation_level=None
        )  # each statement is on disk when it is done
        try:
            for table in _TABLES:
                self._file.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            self._file.execute("BEGIN IMMEDIATE")
            found = dict(self._file.execute("SELECT * FROM run")) or asked
            self._file.executemany("INSERT OR IGNORE INTO run VALUES (?, ?)", found.items())
            self._file.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise ValueError(f"{path} is no journal of an evaluation ({error}). Delete it to begin anew.") from error
        names = [name for name in dict.fromkeys([*asked, *found]) if found.get(name) != asked.get(name)]
        if names:
            self._file.close()
            differences = "; ".join(f"{name} ({found.get(name)}, now {asked.get(name)})" for name in names)
            raise ValueError(
                f"{path} holds the finished part of another run, which differs in {differences}. Go on with the "
                "settings of that run, or delete the file to begin anew."
            )

    def read(self) -> dict[int, Scores]:
        """Read the scores of all processes, by the number of the batch."""
        rows = self._file.execute("SELECT * FROM batches")
        return {number: {name: Score(**own) for name, own in json.loads(text).items()} for number, text in rows}

    def append(self, number: int, scores: Scores) -> None:
        """Add a finished batch."""
        text = json.dumps({name: asdict(score) for name, score in scores.items()})
        self._file.execute("INSERT INTO batches VALUES (?, ?)", (number, text))


def fingerprint(model: PreTrainedModel, windows: Iterable[Window], **settings: Any) -> dict[str, Any]:
    """Sum up what determines the figures, by its name: model, texts, settings, versions.

    Args:
        model: its configuration, every bit of its weights, their dtype and device count. The number of threads counts
            on a CPU, where sums are rounded accordingly.
        windows: their tokens count.
        **settings: anything that JSON has.
    """
    device = model.device.type
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
    weights = model.state_dict().items()
    return {
        "config": _hash([json.dumps(config, sort_keys=True, default=str)]),
        "weights": _hash(f"{name} {list(weight.shape)} {torch.hash_tensor(weight)}" for name, weight in weights),
        "texts": _hash(f"{window.text} {window.first_scored} {list(window.token_ids)}" for window in windows),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "num_threads": torch.get_num_threads() if device == "cpu" else None,
        **settings,
        "versions": {name: version(name) for name in ("hf-paged", "transformers", "torch")},
    }


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
