"""The gate passes what chance explains and fails what it does not."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import regress, store
from tests.benchmarks.test_store import RECORD

NAMES = {
    "ppl": "t/token_ppl@512",
    "byte_ppl": "wikitext/byte_perplexity@0shot",
    "acc": "arc_easy/acc_norm@0shot",
    "cut": "arc_easy/truncated_requests@0shot",
    "speed": "speed/decode_tokens_per_s@b1",
}


def write(folder: Path, seed: int = 0, error: str | None = None, **metrics: tuple[float, float | None]) -> Path:
    """A record below `folder`, failed where it has an `error`; each of `NAMES` is given as value and standard error."""
    entries = {NAMES[name]: {"value": value, "stderr": stderr, "n": 9} for name, (value, stderr) in metrics.items()}
    cell: dict[str, Any] = {**RECORD["cell"], "ratio": 0.5, "seed": seed, "id": str(folder)}
    state = {"status": "failed" if error else "done", "error": error}
    store.write_record(folder / str(seed) / "record.json", RECORD | state | {"cell": cell, "metrics": entries})
    return folder


def status(results: Path, baseline: Path) -> int:
    return regress.main(["--results", str(results), "--baseline", str(baseline)])


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        ({"ppl": (10.0, 0.3)}, {"ppl": (10.9, 0.3)}, True),  # 2 * sqrt(0.3² + 0.3²) = 0.849
        ({"ppl": (10.0, 0.3)}, {"ppl": (10.8, 0.3)}, False),
        ({"ppl": (10.0, 0.0)}, {"ppl": (9.0, 0.0)}, False),
        ({"acc": (0.5, None)}, {"acc": (0.49, None)}, True),
        ({"acc": (0.5, None)}, {"acc": (0.6, None)}, False),
        ({"acc": (0.5, None)}, {"acc": (0.5, None)}, False),
        ({"byte_ppl": (2.0, None)}, {"byte_ppl": (2.1, None)}, True),
        ({"byte_ppl": (2.0, None)}, {"byte_ppl": (1.9, None)}, False),
        ({"speed": (100.0, 1.0)}, {"speed": (1.0, 1.0)}, False),
        ({"cut": (3.0, None)}, {}, False),
        ({"ppl": (10.0, 0.3), "acc": (0.5, 0.1)}, {"ppl": (10.0, 0.3)}, True),
    ],
)
def test_verdicts(before: dict[str, Any], after: dict[str, Any], worse: bool, tmp_path: Path) -> None:
    assert status(write(tmp_path / "after", **after), write(tmp_path / "before", **before)) == worse


def test_the_table_names_what_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(write(tmp_path / "after", ppl=(12.0, 0.1)), write(tmp_path / "before", ppl=(10.0, 0.1)))
    assert NAMES["ppl"] in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("error", ["the disk is full", None])
def test_a_cell_that_is_not_finished_any_more_is_missing(
    error: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write(tmp_path / "before", seed, ppl=(10.0, 0.1))
    write(tmp_path / "after", 0, ppl=(10.0, 0.1))
    if error:
        write(tmp_path / "after", 1, error, ppl=(10.0, 0.1))
    assert status(tmp_path / "after", tmp_path / "before") == 1
    row = capsys.readouterr().out.splitlines()[-1]
    assert "seed 1" in row and (f"failed: {error}" if error else "no record") in row and row.endswith("missing")


def test_every_common_cell_failing_is_judged_and_not_an_error(tmp_path: Path) -> None:
    assert status(write(tmp_path / "after", error="boom"), write(tmp_path / "before", ppl=(10.0, 0.1))) == 1


def test_a_baseline_of_failed_cells_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(regress.UserError, match="No cell below .* is finished"):
        status(write(tmp_path / "after", ppl=(10.0, 0.1)), write(tmp_path / "before", error="boom"))


def test_runs_without_a_common_cell_are_not_comparable(tmp_path: Path) -> None:
    with pytest.raises(regress.UserError, match="no cell in common"):
        status(write(tmp_path / "after", seed=1, ppl=(1.0, 0.1)), write(tmp_path / "before", seed=0, ppl=(1.0, 0.1)))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(regress.UserError, match="no record"):
        status(tmp_path, tmp_path)
