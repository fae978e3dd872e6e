"""Compress models with several methods, evaluate them, and keep one record per model, method, ratio and seed.

    python run_all.py --models tiny-llama --methods shortgpt slicegpt --ratios 0.8 0.6 --budget demo --plan
    python run_all.py --models llama2-7b --ratios 0.5 0.6

Finished cells are skipped: the same command goes on after a crash. `python -m reports` makes the tables.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import checks, cli, executors, launch, plan, preview
from benchmarks.executors import Outcome
from benchmarks.job import Job
from benchmarks.progress import display
from methods.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parse, plan, run, report; the exit status. What the user can mend is said in one paragraph."""
    try:
        arguments = cli.parser().parse_args(argv)
        if arguments.offline:
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        arguments.device = launch.own_device(arguments.device)
        if launch.is_helper():
            return launch.help_out(arguments.device)
        if (status := run(arguments, argv)) == 0:
            launch.announce(None)
        return status
    except UserError as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return 2


def run(arguments: Namespace, argv: Sequence[str]) -> int:
    """As `main`, but a request that is not possible raises `UserError`."""
    if arguments.list:
        print("\n".join(cli.LISTS[arguments.list]()))
        return 0
    request = cli.request(arguments, argv)
    jobs = plan.jobs(request)
    if arguments.plan:
        print(preview.table(jobs))
        return 0
    launch.check(arguments.executor)
    unavailable = checks.before_start(request, jobs, arguments.workers)
    # Planned only now: the checks may have fetched what identifies the weights of a hub model.
    jobs = plan.jobs(replace(request, unavailable=unavailable))
    todo = [job for job in jobs if not job.finished()]
    if request.only_evaluate:
        checks.check_checkpoints(todo)
    with display(sys.stderr) as show:
        outcomes = executors.execute(
            todo, executor=arguments.executor, workers=arguments.workers, fail_fast=arguments.fail_fast, show=show
        )
    return report(jobs, todo, outcomes)


def report(jobs: Sequence[Job], todo: Sequence[Job], outcomes: Sequence[Outcome]) -> int:
    """Say what was done and, last, what failed and why; the exit status."""
    failed = [outcome for outcome in outcomes if outcome.error]
    counts = {
        "done": len(outcomes) - len(failed),
        "finished earlier": len(jobs) - len(todo),
        "not started": len(todo) - len(outcomes),
        "failed": len(failed),
    }
    print(f"{len(jobs)} cells: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count) + ".")
    print(f"For the tables type: python -m reports --results {jobs[0].out} --out {jobs[0].out}/report")
    skips = (f"skipped: {job.cell.model}: {task}: {why}" for job in jobs for task, why in job.not_measured().items())
    for line in dict.fromkeys(skips):
        print(line)
    for outcome in failed:
        print(f"failed: {outcome.job.label}: {outcome.error} (log: {outcome.job.log})")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("run_all.py: interrupted. The same command goes on where this one stopped.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # not sys.exit, which would wait for the cells: they end once this process is gone
