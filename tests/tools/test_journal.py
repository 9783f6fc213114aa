"""An interrupted evaluation goes on where it ended, and gives the figures of one that was not interrupted."""

import contextlib
import copy
import sqlite3

import pytest
import torch

from hf_paged.tools.evaluation import perplexity
from hf_paged.tools.evaluation.journal import Journal, fingerprint
from hf_paged.tools.evaluation.scoring import Score
from hf_paged.tools.evaluation.windows import Window
from tests.models import letter_tokenizer, letters, tiny_llama

TEXTS = [letters(70), letters(33, 1), letters(20, 2)]
SETTINGS = {"page_size": 16, "max_length": 32, "stride": 16, "chunk_size": 9, "batch_size": 2}
NUM_BATCHES = 4
SCORES = {"paged": Score([0.1 + 0.2, 1e-300, 1 / 3], 2e-9, 5e-324, 1e-7, 12, 0.7, 2**40)}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def uninterrupted(model):
    return compute(model)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figures.json.journal"


def compute(model, texts=TEXTS, journal=None, **changes):
    return perplexity(model, letter_tokenizer(), texts, journal=journal, **(SETTINGS | changes))


def without_times(result):
    figures = result.to_dict()
    for row in figures["figures"]:
        del row["tokens_per_s"]
    return figures


def numbers(path):
    with contextlib.closing(sqlite3.connect(path)) as file:
        return [number for (number,) in file.execute("SELECT number FROM batches ORDER BY number")]


def limit_appends(patch, count):
    """Have a run end after so many batches, as by Ctrl-C."""
    append = Journal.append
    left = [None] * count

    def limited(self, *batch):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        append(self, *batch)

    patch.setattr(Journal, "append", limited)


# Going on


@pytest.mark.parametrize("count", range(NUM_BATCHES))
def test_a_run_interrupted_after_any_batch_ends_with_the_same_floats(model, uninterrupted, path, count):
    with pytest.MonkeyPatch.context() as patch:
        limit_appends(patch, count)
        with pytest.raises(KeyboardInterrupt):
            compute(model, journal=path)
    assert numbers(path) == list(range(count))
    assert without_times(compute(model, journal=path)) == without_times(uninterrupted)
    assert numbers(path) == list(range(NUM_BATCHES))


def test_a_finished_run_is_not_computed_again(model, path, monkeypatch):
    first = compute(model, journal=path)
    monkeypatch.setattr(Score, "add", None)
    assert compute(model, journal=path) == first  # times included


def test_any_batches_that_are_missing_are_computed(model, uninterrupted, path):
    compute(model, journal=path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("DELETE FROM batches WHERE number IN (0, 2)")
    assert without_times(compute(model, journal=path)) == without_times(uninterrupted)


def test_scores_come_back_to_the_last_bit(path):
    first, second = (Journal(path, {"caches": ("paged",)}) for _ in range(2))
    first.append(3, SCORES)
    second.append(4, SCORES)
    assert first.read() == second.read() == {3: SCORES, 4: SCORES}


# Other runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caches": ("paged", "dynamic")}, r"caches \(\[\"dynamic\", \"paged\"\], now \[\"paged\", \"dynamic\"\]\)"),
        ({"page_size": 32}, r"page_size \(16, now 32\)"),
        ({"max_length": 33}, r"max_length \(32, now 33\)"),
        ({"stride": 17}, r"stride \(16, now 17\)"),
        ({"chunk_size": 8}, r"chunk_size \(9, now 8\)\. Go on with the settings of that run, or delete"),
        ({"batch_size": 3}, r"batch_size \(2, now 3\)"),
        ({"max_tokens": 30}, r"max_tokens \(null, now 30\)"),
        ({"texts": [*TEXTS[:2], letters(20, 3)]}, r"in texts \("),
        ({"texts": [TEXTS[0] + TEXTS[1], TEXTS[2]]}, r"in texts \("),
    ],
)
def test_the_journal_of_another_run_is_refused_and_stays(model, path, changes, message):
    compute(model, journal=path)
    with pytest.raises(ValueError, match=message):
        compute(model, journal=path, **changes)
    assert numbers(path) == list(range(NUM_BATCHES))


def test_other_weights_give_another_fingerprint(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5].nextafter_(torch.tensor(torch.inf))
    assert differing(fingerprint(model, []), fingerprint(other, [])) == {"weights"}


def test_another_dtype_or_configuration_gives_another_fingerprint(model):
    other = copy.deepcopy(model)
    other.config.rms_norm_eps *= 2
    assert differing(fingerprint(model, []), fingerprint(other, [])) == {"config"}
    assert "dtype" in differing(fingerprint(model, []), fingerprint(copy.deepcopy(model).bfloat16(), []))


def test_another_number_of_threads_gives_another_fingerprint(model):
    before = fingerprint(model, [])
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads + 1)
        assert differing(before, fingerprint(model, [])) == {"num_threads"}
    finally:
        torch.set_num_threads(num_threads)


def test_where_a_model_was_loaded_from_and_its_attention_do_not_matter(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    windows = [Window(0, [3, 4, 5], 1)]
    assert fingerprint(model, windows, stride=3) == fingerprint(again, windows, stride=3)


def differing(one, other):
    return {name for name in one if one[name] != other[name]}


def test_what_is_no_journal_is_refused_and_stays(path):
    path.write_text("not a journal\n" * 100)
    with pytest.raises(ValueError, match="is no journal of an evaluation"):
        Journal(path, {})
    assert path.read_text().startswith("not a journal")
