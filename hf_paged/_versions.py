"""Which versions of torch and Transformers tests have run with, some or all, and one log message above these.

Imported first, so that the message is there before anything may be missing. `pip` is told of no upper bound within a
major version: it would take a newer torch away from whoever has it.
"""

import logging

import torch
import transformers

TESTED = {"torch": ("2.11", "2.15"), "transformers": ("5.21", "5.24")}
"""The oldest and the newest, each without the number of its bug fixes."""


def untested(name: str, version: str) -> str | None:
    """What there is to say about a version that is newer than those tested; None if it isn't.

    Args:
        name: of the package.
        version: of the one that is installed, like `"2.16.0.dev20270101+cpu"`.
    """
    oldest, newest = TESTED[name]
    if _minor(version) <= _minor(newest):
        return None
    return (
        f"{name} {version} is newer than what hf_paged was tested with, {oldest} to {newest}. If something is wrong, "
        f"try the newest of these: pip install '{name}=={newest}.*'."
    )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


for _package in (torch, transformers):
    _message = untested(_package.__name__, _package.__version__)
    if _message is not None:
        logging.getLogger(__name__).warning(_message)
