"""Rooms are small enough to be seen through."""

import pytest

from tests.rooms import PACKAGE

FOLDERS = [path for path in [PACKAGE, *PACKAGE.rglob("*")] if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(PACKAGE.parent).as_posix())
def test_a_folder_has_at_most_ten_files_and_none_over_400_lines(folder):
    files = sorted(folder.glob("*.py"))
    assert len(files) <= 10
    assert {path.name: length for path in files if (length := len(path.read_text().splitlines())) > 400} == {}
