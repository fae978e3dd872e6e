"""The gate passes what chance explains and fails what it does not."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import regress, store
from tests.benchmarks.test_store import RECORD

PPL, ACC = "t/token_ppl@512", "arc_easy/acc_norm@0shot"


def write(folder: Path, seed: int = 0, **metrics: tuple[float, float | None]) -> Path:
    """A record below `folder`; `ppl` and `acc` are given as value and standard error."""
    names = {"ppl": PPL, "acc": ACC, "speed": "speed/decode_tokens_per_s@b1"}
    entries = {names[name]: {"value": value, "stderr": stderr, "n": 9} for name, (value, stderr) in metrics.items()}
    cell: dict[str, Any] = {**RECORD["cell"], "ratio": 0.5, "seed": seed, "id": str(folder)}
    store.write_record(folder / str(seed) / "record.json", RECORD | {"cell": cell, "metrics": entries})
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
        ({"speed": (100.0, 1.0)}, {"speed": (1.0, 1.0)}, False),
        ({"ppl": (10.0, 0.3), "acc": (0.5, 0.1)}, {"ppl": (10.0, 0.3)}, True),
    ],
)
def test_verdicts(before: dict[str, Any], after: dict[str, Any], worse: bool, tmp_path: Path) -> None:
    assert status(write(tmp_path / "after", **after), write(tmp_path / "before", **before)) == worse


def test_the_table_names_what_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(write(tmp_path / "after", ppl=(12.0, 0.1)), write(tmp_path / "before", ppl=(10.0, 0.1)))
    assert PPL in capsys.readouterr().out.splitlines()[-1]


def test_runs_without_a_common_cell_are_not_comparable(tmp_path: Path) -> None:
    with pytest.raises(regress.UserError, match="no cell in common"):
        status(write(tmp_path / "after", seed=1, ppl=(1.0, 0.1)), write(tmp_path / "before", seed=0, ppl=(1.0, 0.1)))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(regress.UserError, match="no record"):
        status(tmp_path, tmp_path)
