"""A store gives back the content that a page had, or nothing, whatever happens to its files."""

import logging
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_paged import PrefixStore
from hf_paged.pages.tiers import checked_file, store
from hf_paged.pages.tiers.base import PageKey
from tests.processes import PROCESSES, kill_after

PAGE_BYTES = 4096
FILE_BYTES = 5300  # no file of such a page is larger
ROOT = bytes(32)


def key_of(number: int, parent: bytes = ROOT, page_size: int = 16) -> PageKey:
    """A page that says a number."""
    tokens = torch.full((page_size,), number, dtype=torch.int32).numpy().astype("<i4").tobytes()
    return PageKey(sha256(parent + tokens).digest(), parent, tokens)


def content_of(number: int, num_bytes: int = PAGE_BYTES) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def put(kept: PrefixStore, *numbers: int) -> None:
    for number in numbers:
        kept.put(key_of(number), content_of(number))


def held(kept: PrefixStore, numbers) -> list[int]:
    """Which of these pages are there, each compared with what it was."""
    found = {number: kept.get(key_of(number)) for number in numbers}
    assert all(content is None or torch.equal(content, content_of(number)) for number, content in found.items())
    return [number for number, content in found.items() if content is not None]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def file_of(kept: PrefixStore, number: int) -> Path:
    name = key_of(number).digest.hex()
    return kept.folder / name[:2] / f"{name}.safetensors"


def age(path: Path, seconds: float) -> None:
    then = path.lstat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.fixture
def kept(tmp_path) -> PrefixStore:
    return PrefixStore(tmp_path / "store", 100 * FILE_BYTES)


# What it keeps


def test_another_store_on_the_same_folder_finds_what_was_put(kept):
    put(kept, 1, 2)
    again = PrefixStore(kept.folder, kept.max_bytes)
    assert held(again, range(4)) == [1, 2]
    assert [key_of(number) in again for number in range(4)] == [False, True, True, False]
    assert again.num_bytes == kept.num_bytes == sum(path.stat().st_size for path in files(kept.folder))


def test_what_is_put_again_is_not_written_again(kept):
    put(kept, 1)
    before = file_of(kept, 1).stat()
    put(kept, 1)
    assert file_of(kept, 1).stat().st_ino == before.st_ino


def test_the_same_tokens_behind_others_are_another_page(kept):
    put(kept, 1)
    assert kept.get(key_of(1, parent=key_of(2).digest)) is None


def test_a_page_of_another_page_size_is_not_found(kept):
    put(kept, 1)
    assert kept.get(key_of(1, page_size=32)) is None


def test_pages_whose_names_collide_are_told_apart(kept, monkeypatch):
    monkeypatch.setattr(store, "_name", lambda digest: digest[:1].hex())
    numbers = range(90)
    put(kept, *numbers)
    assert held(kept, numbers) != []
    assert len(held(kept, numbers)) == len(files(kept.folder)) < 90
    behind = [key_of(number, parent=key_of(number).digest) for number in numbers]
    assert [kept.get(key) for key in behind] == [None] * 90


def test_any_bytes_are_a_name_within_the_folder(kept):
    for digest in (b"../../../x", b"/etc/passwd", b"\0", b"..", bytes(range(100))):
        kept.put(PageKey(digest, ROOT, b"abcd"), content_of(0))
        assert torch.equal(kept.get(PageKey(digest, ROOT, b"abcd")), content_of(0))
    assert len(files(kept.folder.parent)) == len(files(kept.folder)) == 5


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, "10GB", None])
def test_a_bound_is_a_number_of_bytes(tmp_path, max_bytes):
    with pytest.raises(ValueError, match=r"was asked for, but a store needs a whole number of bytes"):
        PrefixStore(tmp_path, max_bytes)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"was given as the folder of a PrefixStore, but can't be one: .*File exists"):
        PrefixStore(tmp_path / "file", 1000)


# Its bound


@pytest.mark.parametrize("num_pages", [1, 2, 7, 100])
def test_it_never_holds_more_than_its_bound_and_fills_most_of_it(tmp_path, num_pages):
    kept = PrefixStore(tmp_path, num_pages * FILE_BYTES)
    for number in range(3 * num_pages):
        put(kept, number)
        assert kept.num_bytes <= kept.max_bytes
    found = held(kept, range(3 * num_pages))
    assert found == list(range(3 * num_pages - len(found), 3 * num_pages))
    assert len(found) >= 0.8 * num_pages


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path):
    kept = PrefixStore(tmp_path, 4 * FILE_BYTES)
    for number in range(4):
        put(kept, number)
        age(file_of(kept, number), 100 - number)
    assert kept.get(key_of(0)) is not None
    put(kept, 1)  # as a hit
    put(kept, 4)
    assert held(kept, range(5)) == [0, 1, 3, 4]


def test_a_page_larger_than_the_store_moves_nothing_out(tmp_path):
    kept = PrefixStore(tmp_path, 2 * FILE_BYTES)
    put(kept, 1, 2)
    kept.put(key_of(3), content_of(3, 3 * FILE_BYTES))
    assert held(kept, range(4)) == [1, 2]


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_counted(kept):
    put(kept, 1)
    left, written = (file_of(kept, 1).with_name(f".{name}.unfinished") for name in ("left", "written"))
    left.write_bytes(bytes(100))
    written.write_bytes(bytes(200))
    age(left, 7200)
    put(PrefixStore(kept.folder, kept.max_bytes), 2)
    assert not left.exists()
    assert written.exists()
    assert kept.num_bytes == sum(path.stat().st_size for path in files(kept.folder))


def test_nothing_is_written_where_what_others_write_leaves_no_room(tmp_path):
    kept = PrefixStore(tmp_path, 2 * FILE_BYTES)
    put(kept, 1)
    file_of(kept, 1).with_name(".other.unfinished").write_bytes(bytes(2 * FILE_BYTES - 100))
    put(kept, 2)
    assert held(kept, range(3)) == []


def test_files_of_others_are_let_be_and_not_counted(kept):
    put(kept, 1)
    others = [kept.folder / "notes.safetensors", file_of(kept, 1).with_name("notes.txt"), kept.folder / "ab.txt"]
    for path in others:
        path.write_bytes(bytes(10))
    assert kept.num_bytes == file_of(kept, 1).stat().st_size
    small = PrefixStore(kept.folder, FILE_BYTES)
    put(small, 2)
    assert held(small, range(3)) == [2]
    assert all(path.exists() for path in others)


# What is not as it was written


def damaged(data: bytes, number: int, other: bytes) -> bytes:
    """The content of a file after something has happened to it."""
    random_ = random.Random(number)
    place = random_.randrange(len(data))
    match number % 6:
        case 0 | 1:  # a bit
            return data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]
        case 2:
            return data[:place]
        case 3:
            return data[:place] + random_.randbytes(random_.randrange(1, 50)) + data[place:]
        case 4:
            return data[:place] + other[place:]
        case _:
            return data[:place] + bytes(len(data) - place)


def test_a_damaged_file_is_a_miss_and_is_removed(kept):
    put(kept, 1, 2)
    path, data, other = file_of(kept, 1), file_of(kept, 1).read_bytes(), file_of(kept, 2).read_bytes()
    num_missed = 0
    for number in range(200):
        changed = damaged(data, number, other)
        path.write_bytes(changed)
        found = held(kept, [1])
        assert found == [1] or not path.exists()
        num_missed += found == []
    assert num_missed > 190  # a few change nothing
    put(kept, 1)
    assert held(kept, [1]) == [1]


@pytest.mark.parametrize(
    "data", [b"", b"\0", bytes(8), b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"text", b"\x80\x04N."]
)
def test_a_file_of_something_else_is_a_miss_and_is_removed(kept, data):
    put(kept, 1)
    file_of(kept, 1).write_bytes(data)
    assert held(kept, [1]) == []
    assert not file_of(kept, 1).exists()


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"content": content_of(1)}, {"format": "something else"}),
        ({"content": content_of(1)}, {}),
        ({}, {"format": "hf-paged page 1"}),
        ({"content": content_of(1), "more": content_of(1)}, {"format": "hf-paged page 1"}),
        ({"content": torch.zeros(3, 3)}, {"format": "hf-paged page 1"}),
    ],
)
def test_a_whole_file_of_another_kind_is_a_miss_and_is_removed(kept, tensors, metadata):
    put(kept, 1)
    checked_file.write_tensors(file_of(kept, 1), tensors, metadata)
    assert held(kept, [1]) == []
    assert not file_of(kept, 1).exists()


def test_files_that_were_swapped_are_misses(kept):
    put(kept, 1, 2)
    shutil.copy(file_of(kept, 1), file_of(kept, 2))
    assert held(kept, range(3)) == [1]


def test_a_link_in_the_place_of_a_file_is_not_followed(kept, tmp_path):
    put(kept, 1)
    elsewhere = tmp_path / "elsewhere"
    file_of(kept, 1).rename(elsewhere)
    file_of(kept, 1).symlink_to(elsewhere)
    before = elsewhere.stat()
    assert key_of(1) not in kept
    assert held(kept, [1]) == []
    assert not file_of(kept, 1).is_symlink()
    file_of(kept, 1).symlink_to(elsewhere)
    put(kept, 1)
    assert held(kept, [1]) == [1]
    assert not file_of(kept, 1).is_symlink()
    assert elsewhere.stat() == before


def test_a_link_in_the_place_of_a_folder_is_not_followed(kept, tmp_path):
    put(kept, 1)
    elsewhere = tmp_path / "elsewhere"
    file_of(kept, 1).parent.rename(elsewhere)
    file_of(kept, 1).parent.symlink_to(elsewhere)
    before = files(elsewhere)
    assert key_of(1) not in kept
    assert held(kept, [1]) == []
    assert kept.num_bytes == 0
    put(kept, 1)
    assert held(kept, [1]) == [1]
    assert not file_of(kept, 1).parent.is_symlink()
    assert files(elsewhere) == before


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_a_miss(kept, make):
    put(kept, 1)
    file_of(kept, 1).unlink()
    make(file_of(kept, 1))
    assert key_of(1) not in kept
    assert held(kept, [1]) == []


def test_what_can_not_be_read_now_is_a_miss_and_stays(kept, monkeypatch):
    def refuse(*_):
        raise PermissionError

    put(kept, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checked_file, "_open", refuse)
        assert held(kept, [1]) == []
    assert held(kept, [1]) == [1]


def test_what_can_not_be_written_is_dropped_and_said_once(kept, caplog):
    kept.folder.rmdir()
    kept.folder.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        put(kept, 1, 2)
    assert held(kept, range(3)) == []
    (record,) = caplog.records
    assert "does not keep pages that it can't write: " in record.message


# Threads and processes


def use(folder: Path, max_bytes: int, seed: int, num_times: int) -> None:
    """Put and get pages at random, each compared with what it was."""
    kept, random_ = PrefixStore(folder, max_bytes), random.Random(seed)
    for _ in range(num_times):
        number = random_.randrange(30)
        if random_.random() < 0.5:
            put(kept, number)
        else:
            held(kept, [number])


def test_threads_may_share_a_store(kept):
    def work(seed: int) -> None:
        random_ = random.Random(seed)
        for _ in range(100):
            put(kept, random_.randrange(200))
            held(kept, [random_.randrange(200)])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert kept.num_bytes <= kept.max_bytes


def test_processes_may_read_write_and_remove_at_the_same_time(tmp_path):
    max_bytes = 8 * FILE_BYTES
    workers = [PROCESSES.Process(target=use, args=(tmp_path, max_bytes, seed, 300)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    kept = PrefixStore(tmp_path, max_bytes)
    assert held(kept, range(30)) != []
    assert kept.num_bytes <= max_bytes


def write_for_ever(sign: Path, folder: Path) -> None:
    kept = PrefixStore(folder, 20 * 10**6)
    torch.set_num_threads(1)
    sign.touch()
    while True:
        for number in range(25):
            kept.put(key_of(number), content_of(number, 10**6))
        for number in range(25):
            file_of(kept, number).unlink(missing_ok=True)


def test_a_process_killed_while_it_writes_leaves_whole_pages(tmp_path):
    random_ = random.Random(0)
    folder = tmp_path / "store"
    for number in range(50):
        awaited = folder if number % 2 else None
        kill_after(0.05 * random_.random(), awaited, write_for_ever, tmp_path / "sign", folder)
        kept = PrefixStore(folder, 20 * 10**6)
        for page in range(25):
            content = kept.get(key_of(page))
            assert content is None or torch.equal(content, content_of(page, 10**6))
    unfinished = list(folder.rglob(".*.unfinished"))
    assert unfinished != []
    for path in unfinished:
        age(path, 7200)
    put(PrefixStore(folder, 20 * 10**6), 100)
    assert list(folder.rglob(".*.unfinished")) == []
