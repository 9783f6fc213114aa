"""What can be measured: figures, a table of them, and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.race import REFERENCES
from hf_paged.tools.bench.settings import Settings
from hf_paged.tools.lab.chart import draw
from hf_paged.tools.lab.table import Row

LAP = ("model", "context", "baseline", "ms_per_step", "ms_per_step_speed", "first_token_s", "first_token_s_speed")
"""Columns of what a lap gives."""

WHOLE = ("kernel_ms", "busy_share", "reserved_bytes", "minimum_bytes")
"""Columns of what a whole run gives beside that."""

FITS = ("baseline", "intercept_ms", "slope_us", "r_squared", "growth")
"""Columns of the lines through the times of `latency`."""


@dataclass(frozen=True)
class Scenario:
    """One measurement.

    Attributes:
        name: for the command line.
        description: one line.
        take: adds rows of figures to a list as they come, and returns the figures that are no rows.
        columns: keys of the rows that a table shows, if they are there.
        drawn: those of which there are pictures.
        by: key that names a line of a picture.
    """

    name: str
    description: str
    take: Callable[[Settings, list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, ...]
    drawn: tuple[str, ...] = ()
    by: str = "baseline"

    def measure(self, settings: Settings, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Take the figures.

        Args:
            settings: of which model, and how.
            rows: where to put rows of figures, so that a caller who is interrupted has those so far.

        Returns:
            The figures, `rows` among them.
        """
        rows = [] if rows is None else rows
        return self.take(settings, rows) | {"rows": rows}

    def draw(self, rows: Sequence[Row], folder: Path, prefix: str) -> None:
        """Draw figures as `PREFIX-FIGURE.svg`, or where there are several models as `PREFIX-FIGURE-MODEL.svg`."""
        models = list(dict.fromkeys(row.get("model", "") for row in rows))
        for model in models:
            own = [row for row in rows if row.get("model", "") == model]
            suffix = f"-{model.replace(' ', '-')}" if len(models) > 1 else ""
            for figure in self.drawn:
                title = f"{self.name}, {model}" if model else self.name
                draw(own, figure, folder / f"{prefix}-{figure}{suffix}.svg", title, self.by)


def with_speed(rows: Sequence[Row]) -> list[Row]:
    """Add how many times as fast as the first of `REFERENCES` a row is, to its first token and in all."""
    ran = [row for row in rows if "error" not in row]
    references = {_case(row): row for name in reversed(REFERENCES) for row in ran if row.get("baseline") == name}
    extended: list[Row] = []
    for row in rows:
        reference = references.get(_case(row), {})
        times = [key for key in ("ms_per_step", "first_token_s", "total_s") if row.get(key) and reference.get(key)]
        extended.append({**row, **{f"{key}_speed": reference[key] / row[key] for key in times}})
    return extended


def _case(row: Row) -> Any:
    return row.get("model"), row.get("context")


def notes(rows: Sequence[Row]) -> list[str]:
    """Say which figures can't tell the caches apart, since they differ by less than they scatter."""
    equal: dict[str, list[str]] = {}
    for row in rows:
        low, high = row.get("ratio_interval", (0, 0))
        if low <= 1 <= high and row["baseline"] not in REFERENCES:
            equal.setdefault(row["baseline"], []).append(str(row.get("context", "")))
    cases = [f"{name} ({', '.join(own)})" if any(own) else name for name, own in equal.items()]
    found = [f"ms per step: no difference from the reference beyond the noise: {', '.join(cases)}."] if cases else []
    held = max((row.get("kv_bytes", 0) for row in rows), default=0)
    noise = max((row.get("peak_noise_bytes", 0) for row in rows), default=0)
    if held < noise:
        found.append(
            f"peak over the model: below the noise. The caches hold {held / 2**20:.1f} MiB at most; what a process "
            f"keeps of its warm-up, and scatters by, is up to {noise / 2**20:.1f} MiB. Take longer prompts."
        )
    return found
