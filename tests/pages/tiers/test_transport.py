import pytest
import torch

from hf_paged.pages.storage import LayerStorage
from hf_paged.pages.tiers import transport
from hf_paged.pages.tiers.transport import host_bytes, page_bytes, read_pages, write_pages

PAGE_SIZE = 16
NUM_PAGES = 7
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def storages(device="cpu", dtype=torch.float32, num_layers=5, seed=0):
    """Layers full of random keys and values, whose head sizes differ."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(num_layers):
        keys, values = torch.zeros(1, 2, 1, 8, dtype=dtype), torch.zeros(1, 1, 1, 4 + layer, dtype=dtype)
        storage = LayerStorage(keys.to(device), values.to(device), NUM_PAGES, PAGE_SIZE)
        for tensor in storage.tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        made.append(storage)
    return made


@pytest.fixture(params=[(2 * 2**20, 64 * 2**20), (3000, 9000), (1, 1)], ids=["whole", "in pieces", "layer by layer"])
def _pieces(request, monkeypatch):
    """Bytes of a copy, and of what is gathered at once."""
    monkeypatch.setattr(transport, "_PIECE_BYTES", request.param[0])
    monkeypatch.setattr(transport, "_STAGED_BYTES", request.param[1])


@DEVICES
@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_on_the_host_is_its_layers_in_order(device, dtype):
    layers, pages = storages(device, dtype), [5, 0, 3]
    contents = read_pages(layers, pages)
    ids = torch.tensor(pages, device=device)
    expected = torch.cat([storage.read_pages(ids) for storage in layers], dim=1).cpu()
    assert torch.equal(torch.stack(contents), expected)
    assert {content.shape for content in contents} == {(page_bytes(layers),)}
    assert all(content.device.type == "cpu" and content.is_pinned() == (device == "cuda") for content in contents)


@DEVICES
@pytest.mark.usefixtures("_pieces")
def test_pages_that_were_read_are_written_anywhere_and_nothing_else_changes(device):
    layers, others = storages(device), storages(device, seed=1)
    before = [[tensor.clone() for tensor in storage.tensors] for storage in others]
    write_pages(others, [6, 1, 2], read_pages(layers, [5, 0, 3]))
    for storage, other, tensors in zip(layers, others, before, strict=True):
        for given, found, old in zip(storage.tensors, other.tensors, tensors, strict=True):
            given, found, old = (tensor[0].unflatten(1, (NUM_PAGES, PAGE_SIZE)) for tensor in (given, found, old))
            assert torch.equal(found[:, [6, 1, 2]], given[:, [5, 0, 3]])
            assert torch.equal(found[:, [0, 3, 4, 5]], old[:, [0, 3, 4, 5]])


def test_the_first_layer_of_all_pages_arrives_first(monkeypatch):
    monkeypatch.setattr(transport, "_PIECE_BYTES", 1)
    monkeypatch.setattr(transport, "_STAGED_BYTES", 1)
    layers, written = storages(num_layers=3), []
    contents = read_pages(layers, [4, 2])
    write = LayerStorage.write_pages

    def note(storage, pages, content):
        written.append((layers.index(storage), pages.tolist()))
        write(storage, pages, content)

    monkeypatch.setattr(LayerStorage, "write_pages", note)
    write_pages(layers, [1, 0], contents)
    assert written == [(layer, [page]) for layer in range(3) for page in (1, 0)]


def test_layers_that_are_small_are_copied_together(monkeypatch):
    layers = storages()
    monkeypatch.setattr(transport, "_PIECE_BYTES", page_bytes(layers[:2]))
    assert [len(piece.storages) for piece in transport._pieces(layers)] == [2, 2, 1]


def test_what_is_read_in_inference_mode_is_written_outside_of_it():
    layers = storages()
    with torch.inference_mode():
        contents = read_pages(layers, [1])
    write_pages(layers, [2], contents)
    assert torch.equal(read_pages(layers, [2])[0], contents[0])


def test_no_page_and_no_layer_are_nothing():
    assert read_pages(storages(), []) == []
    (content,) = read_pages([], [3])
    assert host_bytes(content) == 0
    write_pages([], [3], [content])


@DEVICES
def test_pinned_memory_is_counted_as_what_torch_takes_for_it(device):
    (content,) = read_pages(storages(device), [0])
    assert content.nbytes == 16 * 4 * (5 * 16 + 4 + 5 + 6 + 7 + 8)
    assert host_bytes(content) == (8192 if device == "cuda" else content.nbytes)
