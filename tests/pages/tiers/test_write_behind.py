import threading

import pytest
import torch

from hf_paged.pages.tiers import write_behind
from hf_paged.pages.tiers.base import PageKey
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.write_behind import WriteBehind


def key(number):
    return PageKey(digest=b"%d" % number, parent=b"", tokens=b"")


def content(number):
    return torch.full((10,), number, dtype=torch.uint8)


class Gate(HostTier):
    """A tier that keeps nothing before it is opened."""

    def __init__(self):
        super().__init__(1000)
        self.is_open = threading.Event()

    def put(self, key, content):
        self.is_open.wait(timeout=60)
        super().put(key, content)


def test_nobody_waits_for_a_page_to_be_written_and_it_is_found_meanwhile():
    below = Gate()
    tier = WriteBehind(below)
    tier.put(key(1), content(1))
    assert key(1) in tier
    assert key(2) not in tier
    assert torch.equal(tier.get(key(1)), content(1))
    assert below.num_pages == 0
    below.is_open.set()
    tier.flush()
    assert torch.equal(below.get(key(1)), content(1))
    assert torch.equal(tier.get(key(1)), content(1))
    assert tier.num_bytes == 10


def test_no_more_pages_wait_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(write_behind, "_MAX_BYTES", 25)
    below = Gate()
    tier = WriteBehind(below)
    for number in (1, 1, 2, 3):
        tier.put(key(number), content(number))
    assert [key(number) in tier for number in (1, 2, 3)] == [True, True, False]
    below.is_open.set()
    tier.flush()
    tier.put(key(3), content(3))
    tier.flush()
    assert below.num_pages == 3


def test_a_single_page_always_has_room(monkeypatch):
    monkeypatch.setattr(write_behind, "_MAX_BYTES", 1)
    below = HostTier(1000)
    tier = WriteBehind(below)
    tier.put(key(1), content(1))
    tier.flush()
    assert key(1) in below


def test_a_page_that_can_not_be_written_stands_in_nobodys_way():
    class Broken(HostTier):
        def put(self, key, content):
            raise OSError("no space left on device")

    tier = WriteBehind(Broken(1000))
    tier.put(key(1), content(1))
    with pytest.raises(OSError, match="no space left on device"):
        tier.flush()
    assert key(1) not in tier
