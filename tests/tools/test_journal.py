"""An interrupted evaluation goes on where it ended, and gives the figures of one that was not interrupted."""

import copy
import json

import pytest
import torch

from hf_paged.tools.evaluation import perplexity
from hf_paged.tools.evaluation.fingerprint import fingerprint
from hf_paged.tools.evaluation.journal import Journal, Writer, delete, files
from hf_paged.tools.evaluation.record import Record, Score
from hf_paged.tools.evaluation.windows import Window
from tests.models import letter_tokenizer, letters, tiny_llama

TEXTS = [letters(70), letters(33, 1), letters(20, 2)]
SETTINGS = {"page_size": 16, "max_length": 32, "stride": 16, "chunk_size": 9, "batch_size": 2}
NUM_BATCHES = 4
RECORD = Record(3, {"paged": Score([0.1 + 0.2, 1e-300, 1 / 3], 2e-9, 5e-324, 1e-7, 12, 0.7, 2**40)})


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


def num_records(path):
    return [len(file.read_text().splitlines()) - 1 for file in files(path)]


def limit_appends(patch, count):
    """Have a run end after so many batches, as by Ctrl-C."""
    append = Writer.append
    left = [None] * count

    def limited(self, record):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        append(self, record)

    patch.setattr(Writer, "append", limited)


# Going on


@pytest.mark.parametrize("count", range(NUM_BATCHES))
def test_a_run_interrupted_after_any_batch_ends_with_the_same_floats(model, uninterrupted, path, count):
    with pytest.MonkeyPatch.context() as patch:
        limit_appends(patch, count)
        with pytest.raises(KeyboardInterrupt):
            compute(model, journal=path)
    assert num_records(path) == [count]
    assert without_times(compute(model, journal=path)) == without_times(uninterrupted)
    assert num_records(path) == [NUM_BATCHES]


def test_a_finished_run_is_not_computed_again(model, path, monkeypatch):
    first = compute(model, journal=path)
    monkeypatch.setattr("hf_paged.tools.evaluation.scoring._run_chunk", None)
    assert compute(model, journal=path) == first  # times included


def test_a_run_begun_by_two_processes_is_finished_by_one(model, uninterrupted, path):
    compute(model, journal=path)
    header, *records = path.with_name(f"{path.name}.0").read_text().splitlines(keepends=True)
    path.with_name(f"{path.name}.0").write_text(header + records[2])
    path.with_name(f"{path.name}.1").write_text(header + records[1])
    assert without_times(compute(model, journal=path)) == without_times(uninterrupted)
    assert num_records(path) == [3, 1]


@pytest.mark.parametrize("lost", [1, 2, 100])
def test_a_line_that_was_cut_off_is_computed_again(model, uninterrupted, path, lost):
    compute(model, journal=path)
    (file,) = files(path)
    file.write_bytes(file.read_bytes()[:-lost])
    assert without_times(compute(model, journal=path)) == without_times(uninterrupted)
    assert num_records(path) == [NUM_BATCHES]
    Journal(path, json.loads(file.read_text().splitlines()[0])["fingerprint"]).read()


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_a_header_that_was_cut_off_begins_anew(model, uninterrupted, path, kept):
    compute(model, journal=path)
    (file,) = files(path)
    file.write_bytes(file.read_bytes()[:kept])
    assert without_times(compute(model, journal=path)) == without_times(uninterrupted)
    assert num_records(path) == [NUM_BATCHES]


def test_a_record_comes_back_to_the_last_bit(path):
    journal = Journal(path, {"caches": ("paged",)})
    with journal.writer(0) as writer:
        writer.append(RECORD)
    with journal.writer(1) as writer:
        writer.append(Record(4, RECORD.scores))
    assert journal.read() == [RECORD, Record(4, RECORD.scores)]


def test_files_are_found_in_the_order_of_their_processes_and_deleted(path):
    for suffix in ("10", "2", "0", "0.bak", "txt"):
        path.with_name(f"{path.name}.{suffix}").touch()
    assert [file.suffix for file in files(path)] == [".0", ".2", ".10"]
    delete(path)
    assert files(path) == []
    assert len(list(path.parent.iterdir())) == 2


# Other runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caches": ("paged", "dynamic")}, r"caches \(\['dynamic', 'paged'\], now \['paged', 'dynamic'\]\)"),
        ({"page_size": 32}, r"page_size \(16, now 32\)"),
        ({"max_length": 33}, r"max_length \(32, now 33\)"),
        ({"stride": 17}, r"stride \(16, now 17\)"),
        ({"chunk_size": 8}, r"chunk_size \(9, now 8\)\. Go on with the settings of that run, or delete"),
        ({"batch_size": 3}, r"batch_size \(2, now 3\)"),
        ({"max_tokens": 30}, r"max_tokens \(None, now 30\)"),
        ({"texts": [*TEXTS[:2], letters(20, 3)]}, r"in texts \("),
        ({"texts": [TEXTS[0] + TEXTS[1], TEXTS[2]]}, r"in texts \("),
    ],
)
def test_the_journal_of_another_run_is_refused_and_stays(model, path, changes, message):
    compute(model, journal=path)
    (file,) = files(path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        compute(model, journal=path, **changes)
    assert file.read_bytes() == before


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "is none, or is damaged"),
        ("[1]\n", "is none, or is damaged"),
        ('{"batch": 0}\n', "is none, or is damaged"),
        ('{"fingerprint": {}}\n{"batch": 0, "scores"\n{"batch": 1, "scores": {}}\n', "damaged"),
        ('{"fingerprint": {}}\n{"batch": 0, "scores": {"paged": {"nll": []}}}\n', "damaged"),
    ],
)
def test_what_is_no_journal_is_refused(path, content, message):
    path.with_name(f"{path.name}.0").write_text(content)
    with pytest.raises(ValueError, match=message):
        Journal(path, {}).read()
