"""Texts come from prose, files, the Hub and its cache, whole and in their order; what can't be read says why."""

import json
import shutil

import datasets
import huggingface_hub
import pandas
import pytest

from hf_paged.packaged import prose
from hf_paged.tools.cli import main
from hf_paged.tools.evaluation.texts import load_texts

TEXTS = ["One text.", "", 'NA, "quoted"\nand on', "naïve — ✓"]
WRITERS = {
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "parquet": lambda frame, path: frame.to_parquet(path),
    "csv": lambda frame, path: frame.to_csv(path, index=False),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """What datasets keeps is kept apart for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def without_hub(monkeypatch):
    """As with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path, texts, column="text"):
    WRITERS[path.suffix[1:]](pandas.DataFrame({"id": range(len(texts)), column: texts}), path)
    return str(path)


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")


# What is read


def test_without_a_dataset_the_text_is_the_packaged_prose():
    assert load_texts() == [prose()]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    assert load_texts(str(path)) == ["\n".join(TEXTS)]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["text", "body"])
def test_each_row_of_a_file_is_a_document(tmp_path, suffix, column):
    path = write(tmp_path / f"some.{suffix}", TEXTS, column)
    assert load_texts(path, text_column=column) == TEXTS


def test_a_file_with_brackets_and_capitals_in_its_name_is_that_file(tmp_path):
    write_lines(tmp_path / "some1.jsonl", ["other"])
    write_lines(tmp_path / "some[1].JSONL", ["this"])
    assert load_texts(str(tmp_path / "some[1].JSONL")) == ["this"]


def test_a_folder_has_splits(tmp_path):
    write_lines(tmp_path / "folder" / "train.jsonl", ["a"])
    write_lines(tmp_path / "folder" / "test.jsonl", ["b", "c"])
    folder = str(tmp_path / "folder")
    assert load_texts(folder) == ["b", "c"]
    assert load_texts(folder, split="train") == ["a"]
    assert load_texts(folder, split="test[1:]") == ["c"]


@pytest.mark.parametrize(
    ("dataset", "asked", "texts"),
    [
        ("wikitext-2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), ["a\n\n\n\nb"]),
        ("wikitext-103", ("Salesforce/wikitext", "wikitext-103-raw-v1"), ["a\n\n\n\nb"]),
        ("Salesforce/wikitext:wikitext-2-v1", ("Salesforce/wikitext", "wikitext-2-v1"), ["a\n\n\n\nb"]),
        ("owner/name", ("owner/name", None), ["a", "", "b"]),
        ("owner/name:config", ("owner/name", "config"), ["a", "", "b"]),
    ],
)
def test_a_name_asks_the_hub_for_a_configuration_and_a_split(monkeypatch, dataset, asked, texts):
    calls = []

    def load_dataset(**options):
        calls.append(options)
        return datasets.Dataset.from_dict({"text": ["a", "", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_texts(dataset, split="validation") == texts
    path, name = asked
    assert calls == [{"path": path, "name": name, "split": "validation"}]


def test_a_dataset_in_the_local_cache_needs_no_hub(tmp_path, cache, without_hub):
    write_lines(tmp_path / "folder" / "test.jsonl", ["= Title =", "", "A line."])
    load_texts(str(tmp_path / "folder"))
    (prepared,) = cache.glob("*/*/*/*/dataset_info.json")
    # What a download leaves: owner___name/configuration/version/hash.
    downloaded = cache / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / "0123456789abcdef"
    shutil.copytree(prepared.parent, downloaded)
    (arrow,) = downloaded.glob("*.arrow")
    arrow.rename(downloaded / "wikitext-test.arrow")
    info = json.loads(prepared.read_text())
    info |= {"config_name": "wikitext-2-raw-v1", "dataset_name": "wikitext"}
    info["splits"]["test"]["dataset_name"] = "wikitext"
    (downloaded / "dataset_info.json").write_text(json.dumps(info))
    assert load_texts("wikitext-2") == ["= Title =\n\n\n\nA line."]


# What can't be read


def test_without_the_hub_the_dataset_is_named(without_hub):
    for dataset in ("wikitext-2", "owner/name"):
        with pytest.raises(ConnectionError, match="Couldn't reach"):
            load_texts(dataset)


@pytest.mark.parametrize("dataset", ["owner/name", "none.txt"])
def test_the_command_says_in_one_line_which_texts_it_lacks(without_hub, capsys, dataset):
    assert main(["ppl", "--dataset", dataset]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-paged: ")
    assert dataset in line


def test_a_dataset_that_the_hub_does_not_have_is_named(monkeypatch):
    def load_dataset(**options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nmae' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="'owner/nmae' doesn't exist on the Hub"):
        load_texts("owner/nmae")


@pytest.mark.parametrize("suffix", ["txt", *WRITERS])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=rf"none\.{suffix}"):
        load_texts(str(tmp_path / f"none.{suffix}"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("content", ["no rows {", "\n\n", ""])
def test_a_file_without_rows_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"some.{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"some\.{suffix}' was asked for, but no rows can be read: .+"):
        load_texts(str(path))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_missing_column_names_those_there_are(tmp_path, suffix):
    path = write(tmp_path / f"some.{suffix}", ["a"])
    with pytest.raises(
        ValueError, match=r"in the column 'body', but its columns are id, text\. Name one .* text_column"
    ):
        load_texts(path, text_column="body")


@pytest.mark.parametrize(("column", "value"), [("id", "0"), ("text", "None")])
def test_a_column_that_does_not_hold_strings_is_refused(tmp_path, column, value):
    path = write(tmp_path / "some.jsonl", [None, "a"])
    with pytest.raises(
        ValueError, match=rf"The column '{column}' of .* to hold strings, but row 0 has {value}\. Name"
    ):
        load_texts(path, text_column=column)


def test_texts_that_are_all_blank_are_refused(tmp_path):
    (tmp_path / "some.txt").write_text(" \n")
    for path in (str(tmp_path / "some.txt"), write(tmp_path / "some.jsonl", ["", " "])):
        with pytest.raises(ValueError, match="was asked for, but there is no text in it"):
            load_texts(path)


def test_an_unknown_split_or_configuration_names_those_there_are(tmp_path):
    write_lines(tmp_path / "folder" / "train.jsonl", ["a"])
    folder = str(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"Unknown split \"test\".*\['train'\]"):
        load_texts(folder)
    with pytest.raises(ValueError, match=r"'other' not found\. Available: \['default'\]"):
        load_texts(f"{folder}:other")
