"""Cells of one run share what all ratios need, say so in their records, and leave nothing behind."""

from pathlib import Path

from benchmarks import sharing, store
from benchmarks.job import Job
from tests.benchmarks import small_run

SWEEP = ("--ratios", "0.9", "0.8", "--methods", "shortgpt", "--ratio-tolerance", "0.2")


def test_the_second_ratio_takes_over_what_the_first_has_measured(workplace: Path) -> None:
    assert small_run.run(workplace, *SWEEP) == 0
    notes = {found["cell"]["ratio"]: found["notes"] for found in store.records(workplace / "out")}
    assert notes[1.0] == notes[0.9] == [] and "taken over from another cell" in notes[0.8][0]
    assert not (workplace / "out" / ".shared").exists()


def test_other_seeds_and_texts_are_other_folders(workplace: Path) -> None:
    jobs = planned(workplace, *SWEEP, "--seeds", "0", "1")
    assert len({job.shared for job in jobs}) == 2
    assert len({job.shared for job in jobs if job.cell.seed == 1}) == 1


def test_what_another_run_uses_is_not_removed(workplace: Path) -> None:
    first, *_ = planned(workplace, *SWEEP)
    (first.shared / "scores").mkdir(parents=True)
    with sharing.used(first):
        sharing.remove([first])
        assert (first.shared / "scores").is_dir()
    sharing.remove([first])
    assert not first.shared.parent.exists()


def planned(workplace: Path, *more: str) -> list[Job]:
    """The compressing jobs of a command."""
    from benchmarks import cli, plan

    argv = small_run.arguments(workplace, *more)
    jobs = plan.jobs(cli.request(cli.parser().parse_args(argv), argv))
    return [job for job in jobs if job.cell.method != "dense"]
