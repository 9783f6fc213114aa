"""Files of tensors that are whole, or refused: safetensors with a checksum, written at once or not at all."""

import glob
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

_CHECKSUM = "checksum"
_UNFINISHED = ".unfinished"
_ABANDONED_AFTER = 3600.0  # seconds without a write; the process that wrote the file was killed
_MAX_THREADS = 8  # that hash; more wait for memory


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, survives_crashes: bool = True
) -> None:
    """Write a file in place of one that may be there: whoever reads sees the old one or the new one.

    Args:
        path: of the file, in a folder that exists.
        tensors: by name, on any device.
        metadata: texts by name.
        survives_crashes: whether the file is on the disk afterwards, should the machine stop.

    Raises:
        OSError: if it can't be written; the old one is still there.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(held, {**metadata, _CHECKSUM: _checksum(held, metadata)})
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            if survives_crashes:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if survives_crashes and os.name != "nt":  # which has no way to
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` has written: tensors on the CPU, and metadata.

    Raises:
        FileNotFoundError: if there is nothing.
        OSError: if it can't be read.
        ValueError: if it is no regular file, or not as it was written; says why, as the end of a sentence.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("it is a folder, a link or something else that is no regular file")
    with open(path, "rb", opener=_open) as file:
        data = file.read()
    try:
        tensors: dict[str, Tensor] = load(data)
        metadata: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        checksum = metadata.pop(_CHECKSUM)
    except Exception as error:  # there is no saying what a foreign file makes of a parser
        raise ValueError(f"it is no file of hf-paged, or a damaged one ({type(error).__name__}: {error})") from error
    if checksum != _checksum(tensors, metadata):
        raise ValueError("its content does not match its checksum, so it is damaged")
    return tensors, metadata


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is being written, or was when its process was killed."""
    return name.startswith(".") and name.endswith(_UNFINISHED)


def is_abandoned(path: Path) -> bool:
    """Whether a file is unfinished and will stay so, since nobody has written to it for an hour."""
    return is_unfinished(path.name) and time.time() - path.lstat().st_mtime > _ABANDONED_AFTER


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes have left unfinished of the file of this path."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        with suppress(OSError):
            if is_abandoned(other):
                other.unlink()


def digest_of(tensors: Mapping[str, Tensor]) -> bytes:
    """sha256 of the names, dtypes, shapes and content of some tensors, on whatever device they are."""
    names = sorted(tensors)
    if len(names) > 1:
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
            contents = list(threads.map(lambda name: _digest(tensors[name]), names))
    else:
        contents = [_digest(tensors[name]) for name in names]
    described = [
        (name, str(tensors[name].dtype), list(tensors[name].shape), content)
        for name, content in zip(names, contents, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).digest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(content.view(torch.uint8).numpy().data if len(content) else b"").hexdigest()


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    texts = json.dumps(sorted(metadata.items()))
    return hashlib.sha256(digest_of(tensors) + texts.encode()).hexdigest()


def _open(path: str, flags: int) -> int:
    # Should something else have taken the place of a regular file meanwhile: no link is followed, no pipe waited for.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
