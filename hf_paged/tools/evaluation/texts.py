"""Texts to evaluate on: packaged prose, files, and datasets of the Hugging Face Hub."""

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_paged.packaged import prose

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

_BUILDERS: dict[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".csv": {"path": "csv", "keep_default_na": False},  # else the text "NA" is read as a missing one
}
"""By suffix of a file: what `datasets.load_dataset` reads its rows with."""

_SUFFIXES = (".txt", *_BUILDERS)
_WIKITEXT = "Salesforce/wikitext"
_ALIASES = {
    "wikitext-2": f"{_WIKITEXT}:wikitext-2-raw-v1",
    "wikitext-103": f"{_WIKITEXT}:wikitext-103-raw-v1",
}


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
        ValueError: there is no such file, dataset, configuration, split or column, or no text in it.
        ConnectionError: the dataset is not a local one, and the Hub is out of reach.
        ModuleNotFoundError: `datasets` is needed and not installed.
    """
    if dataset is None:
        return [prose()]
    path = Path(dataset)
    if path.suffix.lower() == ".txt":
        texts = [_read_text(path)]
    elif path.suffix.lower() in _BUILDERS or path.is_file():
        texts = _column(_load_rows(path), text_column, dataset)
    else:
        name, _, config = _ALIASES.get(dataset, dataset).partition(":")
        texts = _column(_load_named(name, config or None, split), text_column, dataset)
        if name == _WIKITEXT:
            texts = ["\n\n".join(texts)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{dataset!r} was asked for, but there is no text in it. Give one that has some.")
    return texts


def _read_text(path: Path) -> str:
    _check_is_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}. Save it in that encoding.") from error


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"The file {path} was asked for, but there is none at {path.absolute()}. Check the path.")


def _load_rows(path: Path) -> "Dataset":
    """Load the rows of one file."""
    _check_is_file(path)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(
            f"The file {path} was asked for, but texts are read from {', '.join(_SUFFIXES)} files only. Convert it."
        )
    _require_datasets(path)
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    try:
        # A single file is what datasets calls the split "train", and it takes brackets in a name for a pattern.
        return load_dataset(**builder, data_files=glob.escape(str(path)), split="train")
    except (DatasetsError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(
            f"{path} was asked for, but no rows can be read from it as {builder['path']}: {reason}. Check its content."
        ) from error


def _load_named(name: str, config: str | None, split: str) -> "Dataset":
    """Load a split of a dataset of the Hub, of the local cache, or of a folder."""
    _require_datasets(name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    asked = f"{name!r} (configuration {config or 'default'}, split {split}) was asked for"
    try:
        return load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"The dataset {asked}, but the Hugging Face Hub can't be reached, and it is not in the local cache. "
            f"Give a local file ({', '.join(_SUFFIXES)}), or none for the packaged prose. [{error}]"
        ) from error
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"The dataset {asked}. {error}") from error


def _column(rows: "Dataset", name: str, dataset: str) -> list[str]:
    """Read one column, all of whose values must be strings."""
    if name not in rows.column_names:
        raise ValueError(
            f"The texts of {dataset!r} were asked for in the column {name!r}, but its columns are "
            f"{', '.join(rows.column_names)}. Name one of them with text_column."
        )
    values = list(rows[name])
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"The column {name!r} of {dataset!r} has to hold strings, but row {index} has {value!r}. "
                "Name another column with text_column, or drop such rows."
            )
    return values


def _require_datasets(asked: object) -> None:
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Texts from {asked} need datasets, which is not installed. Run: pip install "hf-paged[eval]"'
        ) from error
