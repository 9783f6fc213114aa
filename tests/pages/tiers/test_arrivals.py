import pytest
import torch

from hf_paged.pages.group import PageGroup
from hf_paged.pages.tiers.arrivals import INTO_PAGES, Arrivals, CopyStreams
from hf_paged.pages.tiers.speeds import Speeds
from hf_paged.pages.tiers.transport import page_bytes, read_pages

PAGE_SIZE = 16
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
MAY_MOVE = pytest.mark.parametrize("may_move", [False, True])


def group_on(device, may_move=False, num_pages=8, head_dim=8, num_layers=3):
    group = PageGroup(range(num_layers), None, num_pages, None if may_move else num_pages, PAGE_SIZE, 0)
    for layer in group.layers:
        like = torch.zeros(1, 2, 1, head_dim, device=device)
        group.open_storage(layer, like, like)
    return group


def contents_for(group, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = page_bytes(group.storages())
    made = [torch.randn(size // 4, generator=generator).view(torch.uint8) for _ in range(count)]
    return [content.pin_memory() for content in made] if torch.cuda.is_available() else made


def layer_of(contents, layer, num_layers):
    """What pages hold in one layer."""
    return torch.stack([content.chunk(num_layers)[layer] for content in contents])


@DEVICES
@MAY_MOVE
def test_pages_are_there_when_all_is_waited_for_and_their_speed_is_known(device, may_move):
    group, speeds = group_on(device, may_move), Speeds()
    contents, arrivals = contents_for(group, 3), Arrivals(CopyStreams(), speeds)
    arrivals.write(group, [5, 0, 3], contents)
    arrivals.finish()
    assert torch.equal(torch.stack(read_pages(group.storages(), [5, 0, 3])), torch.stack(contents))
    assert speeds.knows(INTO_PAGES) == (device == "cpu" or not may_move)


@DEVICES
@MAY_MOVE
def test_whoever_waits_for_a_layer_reads_its_pages(device, may_move):
    group = group_on(device, may_move, num_pages=64, head_dim=1024, num_layers=8)
    contents, arrivals = contents_for(group, 40), Arrivals(CopyStreams(), Speeds())
    pages = torch.arange(3, 43, device=device)
    arrivals.write(group, range(3, 43), contents)
    found = []
    for layer in group.layers:
        arrivals.wait_for(layer)
        found.append(group.storage(layer).read_pages(pages))
    for layer, read in enumerate(found):
        assert torch.equal(read.cpu(), layer_of(contents, layer, 8))
    arrivals.finish()


@DEVICES
def test_pages_are_not_filled_before_those_have_read_them_who_held_them_before(device):
    group = group_on(device)
    old, new = contents_for(group, 3), contents_for(group, 3, seed=1)
    arrivals = Arrivals(CopyStreams(), Speeds())
    arrivals.write(group, [1, 2, 3], old)
    arrivals.finish()
    if device == "cuda":
        torch.cuda._sleep(10**8)
    read = group.storage(0).read_pages(torch.tensor([1, 2, 3], device=device))
    arrivals.write(group, [1, 2, 3], new)
    arrivals.finish()
    assert torch.equal(read.cpu(), layer_of(old, 0, 3))
    assert torch.equal(torch.stack(read_pages(group.storages(), [1, 2, 3])), torch.stack(new))


@DEVICES
def test_pages_that_are_given_back_after_a_failure_are_filled_no_more(device, monkeypatch):
    group = group_on(device, num_pages=64, head_dim=1024, num_layers=8)
    contents, arrivals = contents_for(group, 40), Arrivals(CopyStreams(), Speeds())
    storage, write = group.storage(7), type(group.storage(7)).write_pages

    def fail(self, pages, content):
        if self is storage:
            raise MemoryError("no room to gather")
        write(self, pages, content)

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "write_pages", fail)
        with pytest.raises(MemoryError, match="no room to gather"):
            arrivals.write(group, range(40), contents)
    arrivals.finish()
    pages = torch.arange(40, device=device)
    zeros = torch.zeros_like(group.storage(0).read_pages(pages))
    group.storage(0).write_pages(pages, zeros)
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(group.storage(0).read_pages(pages), zeros)
