"""Texts to evaluate on: packaged prose, files, and datasets of the Hugging Face Hub."""

import glob
from pathlib import Path
from typing import Any

from hf_paged.packaged import prose

_BUILDERS: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".csv": {"path": "csv", "keep_default_na": False},  # else the text "NA" is read as a missing one
}
"""By suffix of a file: what `datasets.load_dataset` reads its rows with."""

_WIKITEXT = "Salesforce/wikitext"
_ALIASES = {f"wikitext-{size}": f"{_WIKITEXT}:wikitext-{size}-raw-v1" for size in (2, 103)}


def load_texts(dataset: str | None = None, *, split: str = "test", text_column: str = "text") -> list[str]:
    r"""Load documents.

    Args:
        dataset: one of

            - None: the packaged prose, one document.
            - A `.txt` file in UTF-8: one document. `split` and `text_column` mean nothing to it.
            - A `.json`, `.jsonl`, `.parquet` or `.csv` file: a document for each row. `split` means nothing to it.
            - `owner/name` or `owner/name:config`: a dataset of the Hugging Face Hub, or of the local cache where the
              Hub is out of reach; a document for each row. A folder of files that `datasets` reads does too.
            - `wikitext-2` or `wikitext-103`: `Salesforce/wikitext`, in its raw form. Its rows are lines; all of them,
              joined by `"\n\n"` as in Transformers' guide to perplexity, are one document.
        split: of a dataset that is no file, such as `validation` or `test[:10%]`.
        text_column: whose strings are the documents.

    Returns:
        At least one document that is not blank. Blank rows are kept.

    Raises:
        ValueError: there is no such split or column, or no text in it.
        FileNotFoundError: there is no such file or dataset.
        ConnectionError: the dataset is not a local one, and the Hub is out of reach.
        ModuleNotFoundError: `datasets` is needed, and not installed.
    """
    if dataset is None:
        return [prose()]
    path = Path(dataset)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        texts = [path.read_text(encoding="utf-8")]
    elif suffix in _BUILDERS:
        # A single file is what datasets calls the split "train", and it takes brackets in a name for a pattern.
        texts = _column(dataset, text_column, data_files=glob.escape(str(path)), split="train", **_BUILDERS[suffix])
    else:
        name, _, config = _ALIASES.get(dataset, dataset).partition(":")
        texts = _column(dataset, text_column, path=name, name=config or None, split=split)
        if name == _WIKITEXT:
            texts = ["\n\n".join(texts)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{dataset!r} was asked for, but there is no text in it. Give one that has some.")
    return texts


def _column(dataset: str, column: str, /, **source: Any) -> list[str]:
    """Read one column, all of whose values must be strings."""
    from datasets import load_dataset  # not above: prose and text files do without it
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = load_dataset(**source)
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"{dataset!r} was asked for, but no rows can be read: {reason}.") from error
    if column not in rows.column_names:
        raise ValueError(
            f"The texts of {dataset!r} were asked for in the column {column!r}, but its columns are "
            f"{', '.join(rows.column_names)}. Name one of them with text_column."
        )
    for index, value in enumerate(rows[column]):
        if not isinstance(value, str):
            raise ValueError(
                f"The column {column!r} of {dataset!r} has to hold strings, but row {index} has {value!r}. "
                "Name another column with text_column, or drop such rows."
            )
    return list(rows[column])
