import numpy as np
import pytest

from hf_paged.batch.padding import Columns


def bools(*rows):
    return np.array([[bit == "1" for bit in row] for row in rows])


def columns(*rows):
    """A record of these rows, made the way that a cache makes it."""
    mask = bools(*rows)
    new, _ = Columns().split(mask, *mask.shape)
    return Columns().extended(new, *mask.shape)


def as_text(record, num_rows):
    real = np.ones((num_rows, record.count), dtype=bool) if record.real is None else record.real
    return ["".join("1" if bit else "0" for bit in row) for row in real]


def test_a_new_record_is_empty():
    record = Columns()
    assert (record.count, record.real) == (0, None)


def test_without_a_mask_every_column_is_a_token():
    assert Columns().split(None, 2, 3) == (None, True)
    record = Columns().extended(None, 2, 3)
    assert (record.count, record.real) == (3, None)


def test_a_mask_of_ones_is_no_padding():
    assert Columns().split(bools("111", "111"), 2, 3) == (None, True)
    assert columns("11", "11").split(bools("111", "111"), 2, 1) == (None, True)


@pytest.mark.parametrize("rows", [("0111", "1111"), ("1100", "1111"), ("0000", "0101")])
def test_split_returns_the_new_columns_of_the_mask(rows):
    mask = bools(*rows)
    for past in range(4):
        record = Columns() if past == 0 else columns(*(row[:past] for row in rows))
        new, past_is_visible = record.split(mask, 2, 4 - past)
        assert past_is_visible
        if mask[:, past:].all():
            assert new is None
        else:
            assert np.array_equal(new, mask[:, past:])


@pytest.mark.parametrize("stored", [("01", "11"), ("11", "11")])
def test_a_stored_token_may_be_hidden_later(stored):
    new, past_is_visible = columns(*stored).split(bools("011", "101"), 2, 1)
    assert new is None
    assert not past_is_visible


def test_splitting_changes_nothing():
    record = columns("01", "11")
    record.split(bools("011", "111"), 2, 1)
    assert as_text(record, 2) == ["01", "11"]


def test_a_batch_with_padding_needs_its_mask_to_go_on():
    with pytest.raises(ValueError, match=r"holds a batch with padding, so attention_mask is needed .* shape \(2, 3\)"):
        columns("01", "11").split(None, 2, 1)


@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (1, 3), (3, 3)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError,
        match=rf"shape \({shape[0]}, {shape[1]}\), but 2 rows with 2 cached and 1 new columns need \(2, 3\)",
    ):
        columns("01", "11").split(np.ones(shape, dtype=bool), 2, 1)


def test_a_mask_that_wants_a_token_where_padding_was_is_refused():
    with pytest.raises(ValueError, match="wants a token in row 1, column 0, but that column was padding"):
        columns("11", "01").split(bools("111", "111"), 2, 1)


@pytest.mark.parametrize(
    ("stored", "added", "expected"),
    [
        (("01", "11"), None, ["011", "111"]),
        (("11", "11"), ("0", "1"), ["110", "111"]),
        (("01", "11"), ("1", "0"), ["011", "110"]),
    ],
)
def test_extending_appends_columns_and_leaves_the_record_alone(stored, added, expected):
    record = columns(*stored)
    longer = record.extended(None if added is None else bools(*added), 2, 1)
    assert (longer.count, as_text(longer, 2)) == (3, expected)
    assert (record.count, as_text(record, 2)) == (2, list(stored))


def test_tokens_before_a_column_are_counted_without_padding():
    stops = np.array([-2, 0, 2, 4, 5])
    assert columns("0110", "1111").num_tokens_before(stops, 2).tolist() == [[0, 0, 1, 2, 2], [0, 0, 2, 4, 4]]
    assert columns("0110", "1111").num_tokens_before(stops[2:3], 2).tolist() == [[1], [2]]
    assert columns("1111", "1111").num_tokens_before(stops, 2).tolist() == [[0, 0, 2, 4, 4], [0, 0, 2, 4, 4]]


@pytest.mark.parametrize("count", range(5))
def test_truncating_keeps_the_first_columns(count):
    rows = ("1101", "1111")
    record = columns(*rows)
    kept = record.truncated(count)
    assert (kept.count, as_text(kept, 2)) == (count, [row[:count] for row in rows])
    assert (kept.real is None) == (count < 3), "no padding is left"
    assert (record.count, as_text(record, 2)) == (4, list(rows))


@pytest.mark.parametrize("indices", [[1, 0], [0, 0, 1], [1], [0], []])
def test_selecting_rows_moves_their_padding_with_them(indices):
    rows = ("0111", "1111")
    record = columns(*rows)
    selected = record.selected(indices)
    assert (selected.count, as_text(selected, len(indices))) == (4, [rows[index] for index in indices])
    assert (selected.real is None) == (0 not in indices), "no padding is left"
    assert (record.count, as_text(record, 2)) == (4, list(rows))


def test_selecting_rows_without_padding_records_nothing():
    record = columns("11", "11").selected([1, 0, 0])
    assert (record.count, record.real) == (2, None)
