"""The rooms of the package and the imports between them, as a Mermaid diagram.

Why: a drawing that is made by hand is wrong after the next change.

How: `python -m tests.rooms` prints what docs/design.md shows; a test compares them.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_paged"
ROOMS = (
    "tools",
    "scoring",
    "enabling",
    "decoding",
    "cache",
    "compile",
    "attention",
    "batch",
    "pages",
    "_torch",
    "_transformers",
)


def room_of(parts: tuple[str, ...]) -> str | None:
    """The room of a module, given without the package; None for what belongs to none, as errors."""
    return parts[0] if parts and parts[0] in ROOMS else None


def imports() -> set[tuple[str, str]]:
    """Rooms, and others of which they import something."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        importer = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        names = {(module or "").split(".")[0:2][-1] for module in modules if (module or "").startswith("hf_paged.")}
        for name in names:
            imported = room_of((name,))
            if importer and imported and imported != importer:
                found.add((importer, imported))
    return found


def diagram() -> str:
    """The Mermaid text."""
    order = sorted(imports(), key=lambda pair: tuple(map(ROOMS.index, pair)))
    return "\n".join(["```mermaid", "flowchart TD", *(f"    {one} --> {other}" for one, other in order), "```"])


if __name__ == "__main__":
    print(diagram())
