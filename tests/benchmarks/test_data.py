"""Texts: where they come from, that calibration never sees test data, and what is said when one cannot be had."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import data
from benchmarks.data import Text, sample_calibration
from benchmarks.embedded import wikileads
from methods.base import Calibration
from methods.errors import UserError

records = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), min_size=60, unique=True)


def write_jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def characters(text, add_special_tokens, verbose):
    """A tokenizer that has one token per character."""
    return {"input_ids": [ord(letter) for letter in text]}


letters: Any = characters


def own(content):
    """A text of one row."""
    return Text("own", "calibration", content, "", "", {"own": [content]})


@settings(max_examples=20, deadline=None)
@given(records)
def test_a_local_record_is_in_exactly_one_split(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "own.jsonl"
    name = write_jsonl(path, texts)
    parts = [set(data._from_records(Path(name), split)[0]) for split in ("calibration", "test")]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(texts)


def test_a_record_keeps_its_side_whatever_is_around_it(tmp_path):
    texts = [f"record {number}" for number in range(500)]
    (tmp_path / "all.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "half.txt").write_text("\n".join(texts[::2]), encoding="utf-8")
    whole, half = (data.load(str(tmp_path / name), "test").content.split("\n") for name in ("all.txt", "half.txt"))
    assert set(half) == set(whole) & set(texts[::2])
    assert 0.06 < len(whole) / len(texts) < 0.14


def test_a_text_is_hashed_and_knows_its_revision(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, last in zip(paths, "xy", strict=True):
        path.write_text("\n".join(f"line {number}" for number in range(99)) + last, encoding="utf-8")
    first, second = (data.load(str(path), "calibration") for path in paths)
    assert first.revision != second.revision
    assert (first.name, first.split) == (str(paths[0]), "calibration")


def test_a_local_file_is_labelled_by_its_content(tmp_path):
    path = tmp_path / "wikitext2.txt"
    labels, contents = set(), set()
    for last in "xy":
        path.write_text("\n".join(f"line {number}{last}" for number in range(99)), encoding="utf-8")
        labels.add(data.label(str(path)))
        contents.add(data.load(str(path), "test").content)
        assert data.label(str(path)) == f"wikitext2-{sha256(path.read_bytes()).hexdigest()[:8]}"
    assert len(labels) == len(contents) == 2
    assert data.label("wikitext2") == "wikitext2"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("empty.txt", " \n\n ", "is empty"),
        ("bad.jsonl", '{"text": "a"}\n{"txt": "b"}', r'record 2 of .*bad.jsonl.*\{"text": "..."\}'),
        ("worse.jsonl", "no json", "record 1"),
        ("latin.txt", b"caf\xe9", "cannot be read.*UTF-8"),
    ],
)
def test_local_files_that_cannot_be_used(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        data.check(str(tmp_path / file), "calibration", offline=True)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("wikitext", "test", "Did you mean wikitext2.*path of a .txt or .jsonl"),
        ("missing.txt", "test", "missing.txt cannot be read"),
        ("moby-dick", "calibration", "no calibration split.*wikileads"),
        ("alpaca", "test", "no test split.*wikitext2"),
    ],
)
def test_texts_that_are_not_there(name, split, message):
    with pytest.raises(UserError, match=message):
        data.check(name, split, offline=True)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["wikitext2", "c4", "mix"])
def test_a_hub_text_out_of_reach_is_named_before_any_work(name, empty_cache):
    with pytest.raises(UserError, match=r"data set \w+/\w+ .*not whole in the local cache.*Type, where .*data.load\("):
        data.check(name, "calibration", offline=True)


def test_a_prepared_hub_text_is_found_by_split(empty_cache):
    folder = empty_cache / "datasets/sahil2801___code_alpaca-20k/default/0.0.0/0123"
    folder.mkdir(parents=True)
    (folder / "code_alpaca-20k-train.arrow").touch()
    data.check("code-alpaca", "calibration", offline=True)
    folder = empty_cache / "datasets/allenai___c4/default-4f5e/0.0.0/0123"
    folder.mkdir(parents=True)
    (folder / "c4-validation.arrow").touch()
    unfinished = folder.with_name("0123.incomplete")
    unfinished.mkdir()
    (unfinished / "c4-train.arrow").touch()
    data.check("c4", "test", offline=True)
    with pytest.raises(UserError, match="allenai/c4"):
        data.check("c4", "calibration", offline=True)


def test_mix_takes_the_same_number_of_characters_of_each():
    contents = {"a": "x" * 9, "b": "y" * 5, "c": "z" * 7}
    rows = {name: {name: [content]} for name, content in contents.items()}
    mixed = data._mix([Text(name, "calibration", contents[name], "", name, rows[name]) for name in contents])
    assert (mixed.name, mixed.split, mixed.revision) == ("mix", "calibration", "a+b+c")
    assert mixed.content == "xxxxx\n\nyyyyy\n\nzzzzz" and mixed.sha256 == sha256(mixed.content.encode()).hexdigest()
    assert mixed.rows == {name: [content] for name, content in contents.items()}  # whole, not only the equal share


def test_rows_of_a_hub_text_are_its_non_empty_records(monkeypatch):
    from datasets import Dataset

    lines = Dataset.from_dict({"text": [" = Title = \n", "", " A line . \n", " \n"]})
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: lines)
    monkeypatch.setattr(data.hub, "prepared_commit", lambda rows: "0123")
    text = data._load.__wrapped__("wikitext2", "calibration", "")  # past the cache
    assert text.content == "\n\n".join(lines["text"])
    assert text.rows == {"wikitext2": [" = Title = \n", " A line . \n"]}


def test_rows_of_a_local_file_are_its_records(tmp_path):
    texts = [f"record {number}\nof two lines" for number in range(99)]
    name = write_jsonl(tmp_path / "own.jsonl", texts)
    calibration, test = (data.load(name, split) for split in ("calibration", "test"))
    assert "\n".join(calibration.rows[name]) == calibration.content
    assert sorted([*calibration.rows[name], *test.rows[name]]) == sorted(texts)


def test_rows_of_wikileads_are_its_leads():
    try:
        text = data.load("wikileads", "calibration")
    except UserError as error:
        pytest.skip(str(error))
    assert text.content == wikileads.text("calibration") == "".join(text.rows["wikileads"])
    assert all(row.startswith("= ") for row in text.rows["wikileads"])
    assert text.sha256.startswith("29479bc4723ae0f9")  # records name it


def test_instructions_read_like_alpaca():
    row = {"instruction": "Add.", "input": "", "output": "3"}
    assert data._instruction(row) == "### Instruction:\nAdd.\n\n### Response:\n3"
    assert "### Input:\n1 2" in data._instruction({**row, "input": "1 2"})


def test_calibration_is_distinct_windows_of_the_stream():
    text = own("".join(chr(97 + n % 26) for n in range(300)))
    sample = sample_calibration(text, letters, 8, 16, seed=3)
    assert isinstance(sample, Calibration)
    assert (sample.name, sample.samples, sample.window) == ("own", 8, 16)
    assert sample.rows() == {"own": [text.content]}
    batches = [batch.input_ids for batch in sample.batches(3)]
    assert [len(ids) for ids in batches] == [3, 3, 2]
    windows = torch.cat(batches)
    assert windows.dtype == torch.int64
    assert all("".join(map(chr, window)) in text.content for window in windows.tolist())


def test_calibration_depends_on_its_seed_only():
    text = own("".join(map(chr, range(100, 400))))
    same, again, other = (sample_calibration(text, letters, 8, 16, seed) for seed in (0, 0, 1))
    assert same.sha256 == again.sha256 != other.sha256
    assert len({tuple(window) for window in same.input_ids.tolist()}) == 8


def test_calibration_text_may_be_just_long_enough():
    text = own("abcdefghij")
    assert sample_calibration(text, letters, 3, 8, seed=0).samples == 3
    with pytest.raises(UserError, match="own has 10 tokens, too few for 4 different windows of 8"):
        sample_calibration(text, letters, 4, 8, seed=0)


def test_moby_dick_is_the_committed_text():
    text = data.load("moby-dick", "test")
    assert text.content.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert len(text.content.encode()) == 255_889
