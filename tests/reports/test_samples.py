"""Scores per document: read, checked against their record, averaged over seeds, and paired only where they may be."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.records import ReportError, read_all
from reports.results import Result, pool
from reports.samples import Samples, UnpairedError, check_paired, samples
from tests.reports import factory

TASK, TEXT, GROUP = "arc_easy/acc_norm@0shot", "wikileads/token_ppl@512", "mmlu/acc@5shot"
RIGHT = [1.0, 0.0, 1.0, 1.0]
NATS = [3.0, 3.5, 2.5]


def results(tmp_path: Path, *records: dict[str, Any]) -> list[Result]:
    return pool(read_all(factory.write(tmp_path, list(records))))


def made(method: str = "slicegpt", seed: int = 0, documents: str = "documents", **scores: list[float]) -> dict:
    """A record with samples of a task, and others under the names of metrics."""
    content = factory.record("tiny-llama", method, 0.6, seed)
    return factory.sampled(content, {TASK: scores.pop("right", RIGHT), TEXT: NATS, **scores}, documents)


def of(tmp_path: Path, *records: dict[str, Any], name: str = TASK) -> Samples:
    (result,) = results(tmp_path, *records)
    return samples(result, name)


def file_of(tmp_path: Path, name: str = "arc_easy@0shot") -> Path:
    return next(tmp_path.rglob(f"{name}.jsonl.gz"))


def test_scores_of_documents_and_nats_of_windows(tmp_path: Path) -> None:
    (result,) = results(tmp_path, made())
    task, text = samples(result, TASK), samples(result, TEXT)
    assert (task.scores.tolist(), task.weights.tolist()) == (RIGHT, [1, 1, 1, 1])
    assert (text.scores.tolist(), text.weights.tolist()) == (NATS, [511, 511, 511])


def test_several_seeds_are_averaged_per_document(tmp_path: Path) -> None:
    found = of(tmp_path, made(), made(seed=1, right=[1.0, 1.0, 0.0, 1.0]))
    assert found.scores.tolist() == [1, 0.5, 0.5, 1]


def test_seeds_that_saw_other_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnpairedError, match="seeds that saw different documents"):
        of(tmp_path, made(), made(seed=1, documents="others"))


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    content = made(right=[1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    expected = of(tmp_path / "a", content)
    content["samples"]["arc_easy@0shot"].reverse()
    found = of(tmp_path / "b", content)
    assert found.scores.tolist() == expected.scores.tolist() and found.documents == expected.documents


def test_documents_of_a_group_are_those_of_its_parts(tmp_path: Path) -> None:
    parts = {f"mmlu_{part}/acc@5shot": [1.0, score] for part, score in (("anatomy", 0.0), ("law", 1.0))}
    content = made(**parts)
    content["metrics"][GROUP] = {"value": 0.75, "stderr": None, "n": 4}
    assert of(tmp_path, content, name=GROUP).scores.tolist() == [1, 0, 1, 1]


def test_a_record_without_samples(tmp_path: Path) -> None:
    with pytest.raises(UnpairedError, match="no samples"):
        of(tmp_path, factory.record())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def line(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(gzip.compress(text.encode()))


GOOD = '{"id": 0, "hash": "a", "correct": {"acc_norm": 1}}\n'


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (cut, "damaged samples .arc_easy@0shot.jsonl.gz: Compressed file ended"),
        (lambda path: path.write_text("no gzip"), "damaged samples .*Not a gzipped file"),
        (line(GOOD + "{"), "damaged samples .*line 2, JSONDecodeError"),
        (line("[]"), "damaged samples .*line 1, TypeError"),
        (line('{"id": 0, "hash": "a"}'), "damaged samples .*line 1, KeyError 'correct'"),
        (line(GOOD.replace("1}", "null}")), "damaged samples .*line 1, TypeError"),
        (line(GOOD.replace("1}", "NaN}")), "damaged samples .*line 1, ValueError score nan"),
        (line(GOOD * 4), "damaged samples .*a document stands there twice"),
        (line(GOOD), "do not give the record's number .arc_easy@0shot.jsonl.gz: 1 on 1, the record 0.75 on 4"),
        (line(""), "do not give the record's number .*no document"),
    ],
)
def test_damaged_samples_are_named(tmp_path: Path, spoil: Callable[[Path], None], told: str) -> None:
    (result,) = results(tmp_path, made())
    spoil(file_of(tmp_path))
    with pytest.raises(UnpairedError, match=told):
        samples(result, TASK)


def test_samples_of_another_run_are_refused(tmp_path: Path) -> None:
    content = made()
    content["metrics"][TASK]["value"] = 0.5
    with pytest.raises(UnpairedError, match=r"0\.75 on 4, the record 0\.5 on 4"):
        of(tmp_path, content)
    content = made()
    content["metrics"][TEXT]["value"] *= 1.001
    with pytest.raises(UnpairedError, match="do not give the record's number"):
        of(tmp_path / "text", content, name=TEXT)


def pair(tmp_path: Path, **second: Any) -> None:
    first, other = results(tmp_path, made(), made("shortgpt") | second)
    assert first.method == "shortgpt"
    check_paired(samples(first, TASK), samples(other, TASK))


def test_the_same_documents_may_be_paired(tmp_path: Path) -> None:
    pair(tmp_path)


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("task_versions", {"arc_easy@0shot": "2.0"}, r"task version 2\.0, not 1\.0"),
        ("dataset_revisions", {"arc_easy": "abc"}, "data revision abc, not unknown"),
        ("versions", {"lm_eval": "0.3.0"}, r"lm_eval 0\.3\.0, not 0\.4\.13"),
    ],
)
def test_other_versions_are_refused_with_both_named(tmp_path: Path, kind: str, value: object, told: str) -> None:
    with pytest.raises(ReportError, match=told):
        pair(tmp_path, provenance=factory.record()["provenance"] | {kind: value})


def test_other_documents_are_refused_with_both_counts(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"different documents \(4 and 4, by id and hash\)"):
        pair(tmp_path, samples=made(documents="others")["samples"])
    longer = made("shortgpt", right=[*RIGHT, 1.0])
    with pytest.raises(ReportError, match="n 5, not 4"):
        pair(tmp_path / "longer", metrics=longer["metrics"], samples=longer["samples"])


def test_ids_count_as_much_as_hashes(tmp_path: Path) -> None:
    content = made("shortgpt")
    for row in content["samples"]["arc_easy@0shot"]:
        row["id"] += 1
    with pytest.raises(ReportError, match="different documents"):
        pair(tmp_path, samples=content["samples"])


def test_real_files_of_this_repository_are_read() -> None:
    found = pool(read_all(Path(__file__).parents[2] / "results" / "smollm2-135m-q4" / "dense"))
    result = next(result for result in found if result.metric(TASK))
    pooled = result.metric(TASK)
    assert pooled and np.mean(samples(result, TASK).scores) == pytest.approx(pooled.value)
