"""The command: what it writes, what it says, and what it never imports."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from reports.formats import FORMATS
from reports.records import ReportError, read_all
from reports.render import TABLES, files, is_ours
from reports.write import write
from tests.reports import factory

ROOT = Path(__file__).parents[2]
SCORES = {"wikileads/token_ppl@512": [3.0, 3.5, 2.5]}
DIFFERENT = (
    {},
    {"cell__id": "a", "cell__method_config": {"angular": True}},
    {"cell__id": "b", "cell__calibration": {"name": "alpaca"}},
)
SOME = {"value": 0.5, "stderr": None, "n": 1}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "reports", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def contents(tmp_path: Path) -> dict[str, Any]:
    """The files of a report on the factory's matrix, without its figures."""
    return without_figures(files(read_all(factory.write(tmp_path / "results", factory.matrix()))))


def without_figures(found: dict[str, Any]) -> dict[str, Any]:
    """The report's page and its tables."""
    return {name: content for name, content in found.items() if not name.startswith("figures/")}


def test_command_writes_the_report_and_every_table_in_every_format(tmp_path: Path) -> None:
    expected = contents(tmp_path)
    done = run("--results", tmp_path / "results", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "out" / "report.md") in done.stdout
    written = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_file()}
    texts = {name: path.read_text(encoding="utf-8") for name, path in written.items()}
    assert texts.keys() == expected.keys()
    page = texts.pop("index.html"), expected["index.html"]  # differ in the figures alone
    assert len({re.sub(r"data:[^\"]*", "", each) for each in page}) == 1
    assert texts.items() <= expected.items()
    tables = ("perplexity", "zero-shot", "intervals", "size", "compression", "speed", "throughput", "unfinished")
    assert set(expected) == {
        "report.md",
        "index.html",
        *(f"{table}.{suffix}" for table in tables for suffix in FORMATS),
    }


def test_report_holds_head_reading_aid_every_table_the_failed_cell_and_figures(tmp_path: Path) -> None:
    found = contents(tmp_path)
    report = found["report.md"]
    headings = re.findall(r"^## (.+)$", report, re.MULTILINE)
    assert headings == [
        *(
            "What was run",
            "How to read the tables",
            "Perplexity",
            "Zero-shot tasks",
            "Intervals of accuracies",
            "Size",
            "Compression",
            "Speed",
            "Throughput",
        ),
        "Failed, skipped and missing cells and tasks",
        "Figures",
    ]
    assert "4f2a9c1 with uncommitted changes" in report
    assert "LinAlgError: eigenvalues of block 7 did not converge" in report
    assert all(found[f"{name}.md"] in report for name in ("perplexity", "zero-shot", "size", "speed", "unfinished"))


def test_every_link_of_the_report_leads_somewhere(tmp_path: Path) -> None:
    found = files(read_all(factory.write(tmp_path / "results", factory.matrix())))
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(found["report.md"])
    targets, anchors = set(re.findall(r'(?:href|src)="([^"]+)"', page)), set(re.findall(r'<a id="([^"]+)"', page))
    assert targets and targets <= set(found) | {f"#{anchor}" for anchor in anchors}


def test_report_of_failed_cells_only(tmp_path: Path) -> None:
    records = [
        factory.failed("tiny-llama", "shortgpt", 0.6, "boom <b>|\nsecond line"),
        factory.failed("tiny-llama", "slicegpt", 0.6, "", status="skipped"),
    ]
    found = files(read_all(factory.write(tmp_path, records)))
    assert set(found) == {"report.md", "index.html", *(f"unfinished.{suffix}" for suffix in FORMATS)}
    assert "0 finished cells" in found["report.md"]
    assert r"boom \<b\>\| second line" in found["report.md"]
    assert "no reason recorded" in found["report.md"]


@pytest.mark.parametrize("arguments", [("--results", "missing", "--out", "out"), ("compare", "missing", "missing")])
def test_no_folder_ends_in_one_paragraph_and_status_2_with_nothing_written(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = run(*(tmp_path / a if a in ("missing", "out") else a for a in arguments))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "run_all.py" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tables_of_an_earlier_report_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("unfinished.md", "few-shot.html", "notes.md", "size.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / "figures").mkdir()
    for name in ("cost.old.svg", "cost.new.svg", "mine.svg"):
        (tmp_path / "figures" / name).write_text("old")
    write({"report.md": "x", "size.csv": "x", "figures/cost.new.svg": "x"}, tmp_path, stale=is_ours)
    kept = {"report.md", "size.csv", "notes.md", "size.txt", "cost.new.svg", "mine.svg"}
    assert {path.name for path in tmp_path.rglob("*.*")} == kept


def test_every_table_is_known_by_name(tmp_path: Path) -> None:
    metrics = factory.record()["metrics"] | {"arc_easy/acc@5shot": SOME}
    metrics |= dict.fromkeys(("speed/first_token_s_p50@b1", "speed/decode_time_over_bound@b1"), SOME)
    records = [factory.record(metrics=metrics), factory.record(method="wanda", ratio=0.6)]
    records += [factory.record(method="cmoe", ratio=0.6), factory.failed("tiny-llama", "shortgpt", 0.6, "boom")]
    records += [factory.sampled(factory.record(method=name, ratio=0.7), SCORES) for name in ("sleb", "slicegpt")]
    records += [factory.record(method="tomoe", ratio=0.6, **change) for change in DIFFERENT]
    records[1]["structure"] = factory.structure()
    found = without_figures(files(read_all(factory.write(tmp_path, records)), usd_per_hour=2.5))
    assert {name for name in found if name not in ("report.md", "index.html")} == {
        f"{table}.{x}" for table in TABLES for x in FORMATS
    }


def test_report_claims_equal_conditions_only_where_they_are(tmp_path: Path) -> None:
    claim, otherwise = "see the same windows and documents", "Numbers with ‡ were measured on other windows"
    report = " ".join(contents(tmp_path)["report.md"].split())
    assert claim in report and otherwise not in report and "deviation over the seeds" not in report
    other = factory.record(method="slicegpt", ratio=0.6, provenance__task_versions={"ppl-wikileads@512": "2"})
    records = [factory.record(), factory.record(seed=1), other]
    report = " ".join(files(read_all(factory.write(tmp_path / "other", records)))["report.md"].split())
    assert claim not in report and otherwise in report and "deviation over the seeds" in report


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    factory.write(tmp_path / "results", factory.matrix())
    for name, seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-m", "reports", "--results", tmp_path / "results", "--out", tmp_path / name]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.*") if p.is_file()} for name in "ab")
    assert first == second


def test_no_records_say_how_to_make_some(tmp_path: Path) -> None:
    found = files(read_all(tmp_path))
    assert set(found) == {"report.md", "index.html"} and "0 finished cells" in found["report.md"]
    page = MarkdownIt("commonmark").render(found["report.md"])
    assert "python run_all.py --models tiny-llama --ratios 0.8 --budget demo" in page and "<table" not in page


def test_problems_stand_at_the_top(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(), factory.record(schema=2, seed=1)])
    report = files(read_all(tmp_path))["report.md"]
    assert report.index("has schema 2") < report.index("1 finished cell.") < report.index("## What was run")


def test_tables_are_shown_in_the_terminal(tmp_path: Path) -> None:
    factory.write(tmp_path, factory.matrix())
    done = run("--results", tmp_path, "--show", "size", "perplexity")
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 <= done.stdout.index("Size\n") < done.stdout.index("Perplexity\n") and "slicegpt" in done.stdout
    missing = run("--results", tmp_path, "--show", "cost")
    assert missing.returncode == 2 and re.search(r"--show cost.*fill: perplexity.*needs --usd-per-hour", missing.stderr)


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(ReportError, match=r"cannot be written to .*out: .*Give --out another folder"):
        write({"report.md": "x"}, tmp_path / "out")


def test_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"report.md": "old"}, tmp_path)

    def full(path: Path, content: bytes) -> None:
        path.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ReportError, match="No space left on device"):
        write({"report.md": "new"}, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.md", "old")]


def test_report_knows_nothing_of_torch_methods_and_benchmarks() -> None:
    script = (
        "import sys, reports.render; print(sorted({'torch', 'methods', 'benchmarks', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_skipped_task_is_one_row_however_many_cells_lack_it(tmp_path: Path) -> None:
    records = [factory.record(seed=seed) | {"skipped": {"sciq@0shot": "no data"}} for seed in (0, 1)]
    found = files(read_all(factory.write(tmp_path, [*records, factory.record(seed=2)])))
    (row,) = [line for line in found["unfinished.md"].splitlines() if "sciq@0shot" in line]
    assert [cell.strip() for cell in row.split("|")][2:-1] == [
        "dense",
        "100",
        "0; 1",
        "task skipped",
        "sciq@0shot: no data",
        "python run_all.py --models tiny-llama --methods dense --ratios 1.0 --seeds 0 1 --budget demo "
        f"--out {tmp_path} --tasks sciq@0shot",
    ]


def test_tables_are_printed_where_the_locale_has_no_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("--results", factory.write(tmp_path, factory.matrix()), "--show", "perplexity")
    assert done.returncode == 0 and "18.30 ? 0.61" in done.stdout
