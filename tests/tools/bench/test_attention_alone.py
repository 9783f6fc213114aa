"""What the scenario `attention` times is the attention of the last token of each row."""

import pytest
import torch

from hf_paged.tools.bench.scenarios import attention
from hf_paged.tools.bench.settings import Settings


@pytest.mark.parametrize("lengths", [(1, 40), (16, 17, 5), (600,)])
def test_it_attends_to_every_token_of_each_row(monkeypatch, lengths):
    bound = []
    bind = attention.bind
    monkeypatch.setattr(attention, "bind", lambda *arguments: bound.append(arguments) or bind(*arguments))
    attend, num_bytes = attention.decoding(lengths, 16, torch.device("cpu"), torch.float32)
    ((_, table, _, query, keys, values, _),) = bound
    assert table.lengths.tolist() == list(lengths)
    assert num_bytes == sum(lengths) * 2 * 8 * 128 * 4
    outputs = attend()
    for row, length in enumerate(lengths):
        pages = torch.tensor(table.row_pages(row))
        slots = (16 * pages[:, None] + torch.arange(16)).flatten()[:length]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row], keys[0][:, slots], values[0][:, slots], enable_gqa=True
        )
        torch.testing.assert_close(outputs[row, 0], expected[:, 0], rtol=1e-4, atol=1e-5)


def test_its_pages_are_shuffled(monkeypatch):
    tables = []
    bind = attention.bind
    monkeypatch.setattr(attention, "bind", lambda *arguments: tables.append(arguments[1]) or bind(*arguments))
    attend, _ = attention.decoding((320,), 16, torch.device("cpu"), torch.float32)
    assert attend().isfinite().all()
    pages = tables[0].row_pages(0)
    assert sorted(pages) == list(range(20))
    assert pages not in (sorted(pages), sorted(pages, reverse=True))


def test_a_case_is_measured_beside_what_its_bytes_need():
    (row,) = attention.ATTENTION.measure(Settings(prompt_lengths=(40, 5), page_size=16))["rows"]
    assert row["us"] > 0 < row["limit_us"]
    assert row["bandwidth_share"] == pytest.approx(row["limit_us"] / row["us"])


def test_the_cases_are_those_that_the_page_shows():
    assert {name: (len(lengths), max(lengths)) for name, lengths in attention.CASES.items()} == {
        "32 rows to 2k": (32, max(attention.RAGGED)),
        "1 x 32768": (1, 32768),
        "64 x 4096": (64, 4096),
        "16 rows to 32k": (16, max(attention.RAGGED_AND_LONG)),
        "1 x 512": (1, 512),
    }
    assert 16 <= min(attention.RAGGED) < max(attention.RAGGED) < 2048
    assert 16 <= min(attention.RAGGED_AND_LONG) < max(attention.RAGGED_AND_LONG) < 32768
