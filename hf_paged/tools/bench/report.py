"""Tables and plots of a page: `python -m hf_paged.tools.bench.report docs/performance.md docs/results/bench`.

A table stands between `<!-- table: NAME/SCENARIO -->` and `<!-- end -->`, and is that of the results in `NAME.json`.
Where a page shows `assets/NAME-latency.svg`, this is drawn: the time of a token against its context.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_paged.tools.bench.scenario import FITS, with_speed
from hf_paged.tools.bench.scenarios import SCENARIOS
from hf_paged.tools.lab.chart import draw
from hf_paged.tools.lab.table import table


def tables(folder: Path) -> dict[str, str]:
    """Make a Markdown table of each scenario that a folder has results of.

    Args:
        folder: with the JSON files that `hf-paged bench --json` wrote, any number of scenarios in each.

    Returns:
        Tables by file and scenario, as in `"two-threads/latency"`; the lines through the times of `latency` are
        `"two-threads/fits"`.
    """
    made: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in results.keys() & SCENARIOS.keys():
            made[f"{path.stem}/{name}"] = table(
                with_speed(results[name]["rows"]), SCENARIOS[name].columns, markdown=True
            )
        if "fits" in results.get("latency", {}):
            made[f"{path.stem}/fits"] = table(results["latency"]["fits"], FITS, markdown=True)
    return made


def fill(page: str, made: Mapping[str, str]) -> str:
    """Put tables into a page, in place of those that it has.

    Raises:
        ValueError: if the page has a place for a table that there are no results for.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"The page wants a table of {match[1]!r}, but there are results of {list(made)} only.")
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


def plot(page: str, folder: Path, assets: Path) -> None:
    """Draw the plots that a page shows.

    Args:
        page: its text.
        folder: with the results.
        assets: folder for the plots.
    """
    for name in re.findall(r"\(assets/(.*?)-latency\.svg\)", page):
        results: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        title = f"{results['model']}, {results['settings']['dtype']}, one row\n{results['machine']}"
        draw(results["latency"]["rows"], "ms_per_step", assets / f"{name}-latency.svg", title)


def main(page: Path, folder: Path) -> None:
    """Fill the tables of a page, and draw its plots."""
    text = fill(page.read_text(encoding="utf-8"), tables(folder))
    page.write_text(text, encoding="utf-8")
    plot(text, folder, page.parent / "assets")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
