"""Pages on disk."""

import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from hf_paged.pages.tiers.base import PageKey
from hf_paged.pages.tiers.checked_file import is_abandoned, is_unfinished, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_FORMAT = "hf-paged page 1"
_SUFFIX = ".safetensors"
_HEADER_BYTES = 1024  # of a file, at most, beside the tokens
# To look at all files takes time for each of them. So a process looks again when it has written an eighth of what was
# free: as many may fill a store at once. And of a full one a part is freed that is worth to have looked.
_NUM_WRITERS = 8
_FREED = 32


class PrefixStore:
    """Pages in the files of a folder, found by their tokens by any process that runs the same model, now or later.

    Several processes may read, write and remove files at the same time. A file holds the content of one page and its
    tokens, is named by their digest and checked when it is read; what is damaged, or put there by others, is removed
    and computed anew. Links are not followed. The checksum finds damage, not forgery: let only those write to the
    folder whom you trust, and only those read it who may know the prompts.

    Args:
        folder: where the files are; made if it isn't there.
        max_bytes: of all files together. Those that were not used for the longest time are removed first.

    Attributes:
        folder: where the files are.
        max_bytes: of all files together.

    Raises:
        ValueError: for a bound that is no positive number of bytes, or a folder that can't be one.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(
                f"max_bytes={max_bytes!r} was asked for, but a store needs a whole number of bytes that it may fill, "
                "such as 10 * 2**30."
            )
        self.folder = Path(folder).absolute()
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{folder} was given as the folder of a PrefixStore, but can't be one: {error}. Give a folder that "
                "can be written to, or that can be made."
            ) from error
        self._num_unclaimed = 0  # bytes that may be written before the files are looked at again
        self._has_failed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"PrefixStore({str(self.folder)!r}, max_bytes={self.max_bytes})"

    def __contains__(self, key: PageKey) -> bool:
        """Whether there is a file for a page."""
        path = self._path(key)
        return _is_folder(path.parent) and _status(path) is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, those that are being written included."""
        return sum(status.st_size for _, status in self._files())

    def put(self, key: PageKey, content: Tensor) -> None:
        """Write a page, unless it is there, or larger than the whole store may be.

        Where it can't be written, a log message says so, once.

        Args:
            key: its tokens, and those before.
            content: `(page_bytes,)` uint8.
        """
        path = self._path(key)
        num_bytes = content.nbytes + 2 * len(key.tokens) + _HEADER_BYTES
        if num_bytes > self.max_bytes or (key in self and _touch(path)) or not self._make_room(num_bytes):
            return
        try:
            _make_folder(path.parent)
            write_tensors(path, {"content": content}, _described(key), survives_crashes=False)
        except OSError as error:
            if not self._has_failed:
                logger.warning("%r does not keep pages that it can't write: %s", self, error)
            self._has_failed = True
        if self._num_unclaimed < num_bytes:  # others may have written at the same time
            self._remove_oldest(self.max_bytes)

    def get(self, key: PageKey) -> Tensor | None:
        """Read the content of a page, `(page_bytes,)` uint8; None if it isn't here as it was written."""
        path = self._path(key)
        try:
            if not _is_folder(path.parent):
                return None
            tensors, found = read_tensors(path)
            content = _content(tensors, found)
        except ValueError:
            with suppress(OSError):
                path.unlink()
            return None
        except OSError:
            return None
        if found != _described(key):
            return None
        _touch(path)
        return content

    def _path(self, key: PageKey) -> Path:
        name = _name(key.digest)
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def _make_room(self, num_bytes: int) -> bool:
        """Let so many bytes be free; return whether they are."""
        with self._lock:
            if num_bytes > self._num_unclaimed:
                wanted = max(num_bytes, self.max_bytes // _FREED)
                num_free = self.max_bytes - self._remove_oldest(self.max_bytes - wanted)
                if num_bytes > num_free:
                    return False
                self._num_unclaimed = max(num_bytes, num_free // _NUM_WRITERS)
            self._num_unclaimed -= num_bytes
            return True

    def _remove_oldest(self, max_bytes: int) -> int:
        """Remove what was not used for the longest time if there are more bytes; return how many remain.

        What killed processes have left unfinished is removed in any case.
        """
        num_held, files = 0, []
        for path, status in self._files():
            with suppress(OSError):
                if is_abandoned(path):
                    path.unlink()
                    continue
            num_held += status.st_size
            if not is_unfinished(path.name):
                files.append((status.st_mtime_ns, path, status.st_size))
        if num_held <= max_bytes:
            return num_held
        for _, path, num_bytes in sorted(files):
            if num_held <= max_bytes - self.max_bytes // _FREED:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                num_held -= num_bytes
        return num_held

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """All files of pages, those that are being written included; others are let be."""
        for number in range(256):
            folder = self.folder / f"{number:02x}"
            if not _is_folder(folder):
                continue
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        is_page = is_unfinished(entry.name) or entry.name.endswith(_SUFFIX)
                        if is_page and stat.S_ISREG(status.st_mode):
                            yield Path(entry.path), status


def _name(digest: bytes) -> str:
    return digest.hex()


def _described(key: PageKey) -> dict[str, str]:
    names = {"digest": key.digest, "parent": key.parent, "tokens": key.tokens}
    return {"format": _FORMAT} | {name: value.hex() for name, value in names.items()}


def _content(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
    """The content of a page; raises ValueError for a file of another kind."""
    if metadata.get("format") != _FORMAT:
        raise ValueError("it is no file of a page")
    (content,) = tensors.values()
    if content.ndim != 1 or content.dtype != torch.uint8:
        raise ValueError("its tensor is no content of a page")
    return content


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _make_folder(path: Path) -> None:
    """Make the folder of some files; what was in its place, a link for example, is removed."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)


def _status(path: Path) -> os.stat_result | None:
    """What the system says of a regular file; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _touch(path: Path) -> bool:
    """Note that a file was used; return whether it was still there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # it is another user's
        pass
    return True
