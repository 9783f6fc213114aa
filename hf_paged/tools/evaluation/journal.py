"""Finished batches on disk, so that an interrupted run can go on."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_paged.tools.evaluation.fingerprint import Fingerprint
from hf_paged.tools.evaluation.record import Record


class Journal:
    """Files of records as JSON lines, one for each process: `PATH.0`, `PATH.1` and so on.

    The first line of each is a fingerprint of the run. What follows the last newline was cut off in the middle, by
    whatever ended the run, and doesn't count.

    Args:
        path: without the number of the process.
        fingerprint: what determines the records.
    """

    def __init__(self, path: str | Path, fingerprint: Fingerprint) -> None:
        self._path = Path(path)
        self._fingerprint = json.loads(json.dumps(fingerprint))  # tuples are lists, as they will be when read

    def read(self) -> list[Record]:
        """Read the records of all processes, however many there were.

        Raises:
            ValueError: if a file belongs to another run, or is no journal.
        """
        return [record for file in files(self._path) for record in self._read(file)]

    def _read(self, file: Path) -> list[Record]:
        lines = file.read_bytes().split(b"\n")[:-1]
        try:
            header, *records = [json.loads(line) for line in lines] or [{"fingerprint": self._fingerprint}]
            found: Fingerprint = header["fingerprint"]
            finished = [Record.from_dict(record) for record in records]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} was to be read as the journal of an evaluation, but is none, or is damaged ({error}). "
                "Delete it to begin anew."
            ) from error
        differences = _differences(found, self._fingerprint)
        if differences:
            raise ValueError(
                f"{file} holds the finished part of another run, which differs in {'; '.join(differences)}. Go on "
                "with the settings of that run, or delete the file to begin anew."
            )
        return finished

    def writer(self, process: int) -> "Writer":
        """Open the file of a process, to add records to what is there."""
        return Writer(_file(self._path, process), self._fingerprint)


class Writer:
    """The journal of one process, open for records until the end of a `with`.

    Args:
        file: is made, or gone on with.
        fingerprint: for its first line.
    """

    def __init__(self, file: Path, fingerprint: Fingerprint) -> None:
        self._stream = file.open("ab")
        self._stream.truncate(file.read_bytes().rfind(b"\n") + 1)
        if self._stream.seek(0, 2) == 0:
            self._write({"fingerprint": fingerprint})

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def append(self, record: Record) -> None:
        """Add a finished batch; it is on its way to the disk when this returns."""
        self._write(record.to_dict())

    def _write(self, data: dict[str, Any]) -> None:
        self._stream.write(json.dumps(data).encode() + b"\n")
        self._stream.flush()


def files(path: str | Path) -> list[Path]:
    """The files that a journal has, in the order of their processes."""
    path = Path(path)
    numbers = [file.name.removeprefix(f"{path.name}.") for file in _siblings(path)]
    return [_file(path, number) for number in sorted(int(number) for number in numbers if number.isdecimal())]


def delete(path: str | Path) -> None:
    """Delete the files of a journal."""
    for file in files(path):
        file.unlink()


def _siblings(path: Path) -> Sequence[Path]:
    if not path.parent.is_dir():
        return []
    return [file for file in path.parent.iterdir() if file.name.startswith(f"{path.name}.")]


def _file(path: Path, process: int) -> Path:
    return path.with_name(f"{path.name}.{process}")


def _differences(found: Fingerprint, asked: Fingerprint) -> list[str]:
    pairs = [(name, found.get(name), asked.get(name)) for name in dict.fromkeys([*asked, *found])]
    return [f"{name} ({before!r}, now {now!r})" for name, before, now in pairs if before != now]
