"""The command line of `run_all.py`: its options, and what they ask for. Needs no torch."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import methods
from benchmarks import models, suites, tasks
from benchmarks.executors import EXECUTORS
from benchmarks.plan import Request
from benchmarks.presets import PRESETS
from methods.errors import UserError, unknown
from methods.recovery import KINDS

DEFAULT_METHODS = ("dense", "shortgpt", "slicegpt", "disp-llm", "tomoe")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """Every option of the command line; a test holds the list."""
    default_methods = [name for name in DEFAULT_METHODS if name in methods.names()]
    options = argparse.ArgumentParser(
        prog="run_all.py",
        description="Compress models with several methods to the same measured size, and evaluate them all.",
        epilog="exit status: 0 all cells done, 1 a cell failed, 2 the request is not possible",
        allow_abbrev=False,
    )
    what = options.add_argument_group("what to measure")
    what.add_argument("--models", nargs="+", default=[], metavar="M", help="alias, hub id or directory")
    what.add_argument("--ratios", nargs="+", default=[], type=float, metavar="R", help="shares that stay, in (0, 1]")
    what.add_argument(
        "--methods",
        nargs="+",
        default=default_methods,
        metavar="METHOD",
        help=f"names or all; dense is always there (default: {' '.join(default_methods)})",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        default=["ppl", "zeroshot", "speed"],
        metavar="TASK",
        help=f"tasks or suites ({' '.join(suites.SUITES)}; default: ppl zeroshot speed)",
    )
    what.add_argument("--seeds", nargs="+", default=[0], type=int, metavar="N", help="one cell each (default: 0)")
    how = options.add_argument_group("how to measure it")
    how.add_argument("--budget", choices=PRESETS, default="paper", help="how much calibration and evaluation (paper)")
    how.add_argument("--ratio-basis", choices=("total", "block"), default="total", help="the share of what (total)")
    how.add_argument("--ratio-tolerance", type=float, metavar="X", help="off-budget beyond (0.01 or one grid step)")
    how.add_argument(
        "--calibration",
        metavar="NAME[:NxT]",
        help="data set, .txt or .jsonl (default: the model's own); :16x1024 for 16 windows of 1024 tokens",
    )
    how.add_argument("--set", nargs="+", action="extend", default=[], metavar="METHOD.FIELD=VALUE")
    how.add_argument("--recover", choices=KINDS, help="fine-tune every compressed model too, in cells of their own")
    how.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:N or mps (default: auto)")
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a cpu, else bfloat16")
    how.add_argument("--offline", action="store_true", help="fetch nothing; say before the start what is missing")
    where = options.add_argument_group("where, and how much at once")
    where.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="records (default: results)")
    where.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep the compressed checkpoints here")
    where.add_argument("--executor", default="process", metavar="E", help=f"{' or '.join(EXECUTORS)} (process)")
    where.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    run = options.add_argument_group("what to run of it")
    run.add_argument("--plan", action="store_true", help="print the matrix and what it will cost; run nothing")
    run.add_argument("--force", action="store_true", help="compress and measure the --tasks again; others stay")
    run.add_argument("--only-evaluate", action="store_true", help="never compress; checkpoints must be there")
    run.add_argument("--fail-fast", action="store_true", help="start no cell after the first failure")
    run.add_argument("--list", choices=LISTS, help="print the names that are known; run nothing")
    return options


def _methods() -> list[str]:
    found = {name: methods.get(name) for name in methods.names()}
    return [f"{name:20} {method.title:20} {method.reference}".rstrip() for name, method in found.items()]


LISTS = {
    "models": lambda: [f"{name:20} {models.resolve(name).title}" for name in models.names()],
    "methods": _methods,
    "tasks": lambda: [*(f"{name:20} suite" for name in suites.SUITES), *tasks.names()],
}
"""What `--list` prints."""


def request(arguments: argparse.Namespace, argv: Sequence[str]) -> Request:
    """What the parsed command line asks for.

    Raises:
        UserError: an option is missing or its value malformed.
    """
    chosen = [name for asked in arguments.methods for name in (methods.names() if asked == "all" else [asked])]
    _require(arguments, chosen)
    return Request(
        models=tuple(arguments.models),
        methods=tuple(chosen),
        ratios=tuple(arguments.ratios),
        seeds=tuple(arguments.seeds),
        tasks=tuple(arguments.tasks),
        budget=arguments.budget,
        ratio_basis=arguments.ratio_basis,
        ratio_tolerance=arguments.ratio_tolerance,
        calibration=arguments.calibration,
        settings=settings(arguments.set),
        recover=arguments.recover,
        out=arguments.out,
        checkpoints=arguments.checkpoints,
        device=arguments.device,
        dtype=arguments.dtype,
        offline=arguments.offline,
        force=arguments.force,
        only_evaluate=arguments.only_evaluate,
        command=shlex.join(["python", "run_all.py", *argv, *_unnamed(arguments, argv, chosen)]),
    )


def _unnamed(arguments: argparse.Namespace, argv: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The methods, where nobody named them: their default and `all` may be others one day."""
    named = any(word.partition("=")[0] == "--methods" for word in argv)
    return [] if named and "all" not in arguments.methods else ["--methods", *chosen]


def _require(arguments: argparse.Namespace, chosen: Sequence[str]) -> None:
    """What argparse cannot check by itself."""
    if not arguments.models:
        raise UserError("No model is named. Type for example: python run_all.py --models tiny-llama --ratios 0.8")
    if not arguments.ratios and set(chosen) != {"dense"}:
        raise UserError("No ratio is named: the share of the parameters that stays. Type for example: --ratios 0.5 0.6")
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: at least one cell runs at a time. Type --workers 1")
    if arguments.executor not in EXECUTORS:
        raise unknown("executor", arguments.executor, EXECUTORS, "ray and slurm are not part of this version.")


def settings(assignments: Sequence[str]) -> dict[str, dict[str, str]]:
    """`METHOD.FIELD=VALUE` texts as values by method and field.

    Raises:
        UserError: a text of another form, or the same field twice.
    """
    parsed: dict[str, dict[str, str]] = {}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        method, dot, field = target.partition(".")
        if not (equals and dot and method and field):
            raise UserError(
                f"--set {assignment} is not METHOD.FIELD=VALUE. Type for example: --set shortgpt.metric=angular"
            )
        if field in parsed.setdefault(method, {}):
            raise UserError(f"--set gives {target} twice. Keep one of the two.")
        parsed[method][field] = value
    return parsed
