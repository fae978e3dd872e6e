"""What is missing, and what to type: commands that `run_all.py` understands and that mean these very cells."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cli, plan
from reports.commands import command, folded, of_cell, parsed
from reports.records import Record, read_all
from reports.unfinished import unfinished_table
from tests.reports import factory

ROOT = Path(__file__).parents[2]
RUN = "python run_all.py --models tiny-llama --methods slicegpt sleb --ratios 0.8 0.6 --budget demo --out out/a"


def rows(tmp_path: Path, *records: dict[str, Any]) -> list[list[Any]]:
    table = unfinished_table(read_all(factory.write(tmp_path, list(records))))
    return [[cell.value for cell in row] for row in table.rows] if table else []


def ran(method: str, ratio: float, run: str = RUN, **changes: Any) -> dict[str, Any]:
    return factory.record(method=method, ratio=ratio, provenance__command=run, **changes)


def cells(text: str) -> set[str]:
    """The ids of the cells that a command runs."""
    arguments = shlex.split(text)[2:]
    return {job.cell.id for job in plan.jobs(cli.request(cli.parser().parse_args(arguments), arguments))}


def test_a_whole_matrix_misses_nothing(tmp_path: Path) -> None:
    whole = [ran(method, ratio) for method in ("slicegpt", "sleb") for ratio in (0.8, 0.6)]
    assert rows(tmp_path, ran("dense", 1.0), *whole) == []


def test_a_failed_cell_has_its_reason_and_command(tmp_path: Path) -> None:
    failed = factory.failed("org--my model", "slicegpt", 0.6, "boom")
    failed["cell"] |= {"seed": 3, "recover": {"kind": "lora"}}
    given = "--models 'org/my model' --methods slicegpt wanda --ratios 0.8 0.6 --seeds 0 3 --recover lora --force"
    others = "--set slicegpt.a=1 wanda.b=2 --set lora.rank=4 --calibration x:2x8 --budget=demo --out out/b"
    failed["provenance"] |= {"command": f"python run_all.py {given} {others}"}
    row, *_ = rows(tmp_path, failed)
    typed = "--models 'org/my model' --methods slicegpt --ratios 0.6 --seeds 3 --recover lora"
    kept = f"--set slicegpt.a=1 lora.rank=4 --calibration x:2x8 --budget demo --out {tmp_path}"
    why = ["60", "3", "failed", "boom", f"python run_all.py {typed} {kept}"]
    assert row == ["org--my model", "slicegpt + fine-tuning (slicegpt.a=1, lora.rank=4)", *why]


def test_cells_that_a_run_was_asked_for_and_never_started(tmp_path: Path) -> None:
    typed = f"python run_all.py --models tiny-llama --methods {{}} --budget demo --out {tmp_path}"
    why = ["0", "missing", "asked for, but never started"]
    assert rows(tmp_path, ran("dense", 1.0), ran("sleb", 0.8)) == [
        ["tiny-llama", "slicegpt", "60; 80", *why, typed.format("slicegpt --ratios 0.6 0.8")],
        ["tiny-llama", "sleb", "60", *why, typed.format("sleb --ratios 0.6")],
    ]


def test_cells_that_others_have(tmp_path: Path) -> None:
    alone = "python run_all.py --models tiny-llama --methods {} --ratios {} --budget demo"
    records = [ran(method, ratio, alone.format(method, ratio)) for method, ratio in (("sleb", 0.8), ("slicegpt", 0.6))]
    patterns = ran("wanda", 0.5, alone.format("wanda", 0.5))
    found = rows(tmp_path, *records, patterns)
    assert [(row[1], row[2], row[-1]) for row in found] == [
        ("dense", "100", f"{alone.format('dense', '1.0')} --out {tmp_path}"),
        ("slicegpt", "80", f"{alone.format('slicegpt', 0.8)} --out {tmp_path}"),
        ("sleb", "60", f"{alone.format('sleb', 0.6)} --out {tmp_path}"),
    ]


def test_a_matrix_has_one_basis_and_one_preset(tmp_path: Path) -> None:
    block = ran("sleb", 0.8, f"{RUN} --ratio-basis block", cell__ratio_basis="block", cell__id="b")
    tried = ran("dense", 1.0, "", cell__budget={"name": "smoke"}, cell__id="c")
    found = rows(tmp_path, ran("dense", 1.0, ""), block, tried, ran("slicegpt", 0.8, ""))
    assert not any("smoke" in row[-1] for row in found)
    assert all("--ratio-basis block" in row[-1] for row in found)


def test_tasks_that_were_skipped_or_that_others_have(tmp_path: Path) -> None:
    lacking = ran("sleb", 0.8, skipped={"ppl-wikileads@512": "no network"}, provenance__task_versions={"a@0shot": "1"})
    other = ran("slicegpt", 0.8, provenance__task_versions={"ppl-wikileads@512": "1", "b@0shot": "1"})
    found = {(row[4], row[1]): (row[5], row[6]) for row in rows(tmp_path, lacking, other)}
    typed = (
        f"python run_all.py --models tiny-llama --methods {{}} --ratios 0.8 --budget demo --out {tmp_path} --tasks {{}}"
    )
    skipped = ("ppl-wikileads@512: no network", typed.format("sleb", "ppl:wikileads@512"))
    assert found["task skipped", "sleb"] == skipped
    assert found["task missing", "sleb"] == ("b@0shot: others have it", typed.format("sleb", "b@0shot"))
    assert found["task missing", "slicegpt"] == ("a@0shot: others have it", typed.format("slicegpt", "a@0shot"))


def test_what_failed_is_not_missing_too(tmp_path: Path) -> None:
    failed = factory.failed("tiny-llama", "slicegpt", 0.6, "boom")
    failed["provenance"] |= {"command": RUN}
    records = [ran("dense", 1.0), ran("sleb", 0.6), ran("sleb", 0.8), ran("slicegpt", 0.8), failed]
    assert [row[4] for row in rows(tmp_path, *records)] == ["failed"]


def committed() -> list[Record]:
    """Records whose methods still have the defaults they had: all but ToMoE's older ones, and whose texts are here."""
    return [r for r in read_all(ROOT / "results") if r.cell["method"] != "tomoe" and r.cell["model"] == "tiny-phi"]


def test_the_command_of_a_committed_record_means_its_cell() -> None:
    assert len(committed()) > 30
    for record in committed():
        assert record.cell["id"] in cells(command(of_cell(record))), record.path


def test_a_record_that_is_taken_away_is_asked_for_again() -> None:
    whole = [record for record in committed() if not record.cell.get("recover")]
    for lost in whole[::7]:
        table = unfinished_table([record for record in whole if record is not lost])
        assert table is not None
        assert any(lost.cell["id"] in cells(str(row[-1].value)) for row in table.rows if str(row[4]) == "missing")


def test_the_default_command_is_known_to_be_half_done(tmp_path: Path) -> None:
    typed = ["--models", "tiny-llama", "--ratios", "0.8", "0.6", "--budget", "demo"]
    run = cli.request(cli.parser().parse_args(typed), typed).command
    made = [ran("dense", 1.0, run), ran("shortgpt", 0.8, run), ran("shortgpt", 0.6, run)]
    found = {(row[1], row[2]) for row in rows(tmp_path, *made) if row[4] == "missing"}
    others = set(cli.DEFAULT_METHODS) - {"dense", "shortgpt"}
    assert found == {("; ".join(sorted(others)), "60; 80")}


def test_the_dense_model_is_missed_once_per_preset_and_on_no_basis(tmp_path: Path) -> None:
    block = ran("sleb", 0.8, f"{RUN} --ratio-basis block", cell__ratio_basis="block", cell__id="b")
    assert not any(row[1] == "dense" for row in rows(tmp_path / "a", ran("dense", 1.0), block))
    smoke = ran("slicegpt", 0.8, cell__budget={"name": "smoke"}, cell__id="c")
    (row,) = [row for row in rows(tmp_path / "b", ran("dense", 1.0), block, smoke) if row[1] == "dense"]
    assert row[4:6] == ["missing", "the reference of all that was compressed"]


def test_a_matrix_has_one_calibration(tmp_path: Path) -> None:
    run = "python run_all.py --models tiny-llama --methods {0} --ratios {1} --calibration {2} --budget demo"
    whole = [(method, ratio, "a") for method in ("slicegpt", "sleb") for ratio in (0.8, 0.6)]
    cells = [*whole, ("slicegpt", 0.8, "b"), ("sleb", 0.8, "b"), ("sleb", 0.6, "b")]
    made = [
        ran(method, ratio, run.format(method, ratio, text), cell__calibration={"name": text}, cell__id=f"{at}")
        for at, (method, ratio, text) in enumerate(cells)
    ]
    (row,) = rows(tmp_path, ran("dense", 1.0, ""), *made)
    assert row[1:5] == ["slicegpt", "60", "0", "never asked for"] and "--calibration b" in row[-1]


def test_what_an_older_version_recorded_is_said_to_be_another_cell(tmp_path: Path) -> None:
    tasks = {"a@0shot": "1"}
    newer = ran("sleb", 0.8, cell__method_config={"x": 1, "y": 2}, provenance__task_versions=tasks | {"b@0shot": "1"})
    older = ran("sleb", 0.6, cell__method_config={"x": 1}, provenance__task_versions=tasks)
    (row,) = [row for row in rows(tmp_path, newer, older) if row[4] == "task missing"]
    assert row[5].startswith("b@0shot: others have it; recorded by a version with other settings")


@pytest.mark.parametrize("ratios", ["zz", "nan inf 7", "0.8 0.@"])
def test_damaged_ratios_of_a_command_ask_for_nothing(tmp_path: Path, ratios: str) -> None:
    run = f"python run_all.py --models tiny-llama --methods sleb --ratios {ratios} --seeds q"
    assert [row[1:3] for row in rows(tmp_path, ran("dense", 1.0, run), ran("sleb", 0.8, run))] in (
        [],
        [["sleb", "80"]],
    )


@pytest.mark.parametrize("text", ["", "it's", "c", "--models", "python run_all.py x --models= --ratios"])
def test_damaged_commands_are_no_options(tmp_path: Path, text: str) -> None:
    row, *_ = rows(tmp_path, factory.failed("tiny-llama", "sleb", 0.6, "boom") | {"provenance": {"command": text}})
    assert row[-1].startswith("python run_all.py --models tiny-llama --methods sleb --ratios 0.6")


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1).filter(lambda w: w[0] != "-")


@given(st.dictionaries(st.sampled_from(["--a", "--b-c"]), st.lists(WORDS)))
def test_a_command_is_parsed_as_it_was_typed(options: dict[str, list[str]]) -> None:
    assert parsed(command(options)) == options


@given(st.sets(st.tuples(*[st.sampled_from("abc")] * 2), min_size=1))
def test_folded_commands_mean_the_same_cells(pairs: set[tuple[str, str]]) -> None:
    found = folded([{"--x": [x], "--y": [y]} for x, y in sorted(pairs)], "--x", "--y")
    meant = [(x, y) for options in found for x in options["--x"] for y in options["--y"]]
    assert sorted(meant) == sorted(pairs)
