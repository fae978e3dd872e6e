"""Time and robustness of the suite itself: what tests must not time, and what takes too long for a test.

    python -m benchmarks.selfcheck startup           # --list and --plan beside a bare interpreter
    python -m benchmarks.selfcheck methods           # compressing tiny-llama beside one pass over the calibration text
    python -m benchmarks.selfcheck experts           # an MLP of experts beside the dense one, by store and tokens
    python -m benchmarks.selfcheck constructions     # the same, cut as each method that makes experts does it
    python -m benchmarks.selfcheck decode            # a token of a sparse model beside one of the dense model
    python -m benchmarks.selfcheck evaluator         # scoring tasks beside stock lm-eval
    python -m benchmarks.selfcheck speed --times 5   # how much the figures of the speed task differ from time to time
    python -m benchmarks.selfcheck training          # a ToMoE training step beside a plain forward pass
    python -m benchmarks.selfcheck report --times 10 # a report of the committed records, and of so many copies of them
    python -m benchmarks.selfcheck kill --times 20   # SIGKILL a running matrix at random moments, compare the records

Times are medians of interleaved repeats of one run, so that a busy machine slows everything alike.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import store

ROOT = Path(__file__).parents[1]
PLAN = "--models llama2-7b llama2-13b llama3-8b qwen2.5-7b phi-2 opt-125m --ratios 0.7 0.6 0.5 0.4 --plan".split()
MATRIX = "--models tiny-llama --methods shortgpt slicegpt --ratios 0.7 --tasks ppl wikileads_mc --budget smoke".split()
CALIBRATION = {"samples": 16, "window": 256}


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start `run_all.py` with plain progress lines on a pipe."""
    command = [sys.executable, "run_all.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finish(arguments: Sequence[str]) -> None:
    """Run `run_all.py` to the end, which must be a good one."""
    subprocess.run([sys.executable, "run_all.py", *arguments], cwd=ROOT, check=True, capture_output=True)


def interleaved(tasks: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each task, shape [repeats], after so many that do not count; the tasks take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats + warm_up):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[warm_up:] for name, values in seconds.items()}


def show(seconds: Mapping[str, Sequence[float]]) -> None:
    """A line per task: least, median and largest seconds, and the median as a multiple of the first task's."""
    unit = median(next(iter(seconds.values())))
    print(f"{'':12} {'min':>8} {'median':>8} {'max':>8}   x first")
    for name, values in seconds.items():
        print(f"{name:12} {min(values):8.3f} {median(values):8.3f} {max(values):8.3f} {median(values) / unit:9.1f}")


def startup(repeats: int) -> None:
    """How long a user waits for `--list` and `--plan`."""
    bare = [sys.executable, "-c", "pass"]
    commands = {"python": bare, "--list": [sys.executable, "run_all.py", "--list", "models"]}
    commands["--plan"] = [sys.executable, "run_all.py", *PLAN]

    def runner(command: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    show(interleaved({name: runner(command) for name, command in commands.items()}, repeats))


def compress(repeats: int) -> None:
    """How long each method takes on tiny-llama, beside one forward pass over the same calibration windows."""
    import torch
    from transformers import AutoModelForCausalLM

    import methods
    from benchmarks import data, models
    from methods.base import Budget, Context

    path = models.resolve("tiny-llama").prepare()
    tokenizer = models.load_tokenizer(path)
    calibration = data.sample_calibration(data.load("wikileads", "calibration"), tokenizer, seed=0, **CALIBRATION)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.no_grad()
    def one_pass() -> None:
        model = load()
        for batch in calibration.batches(8):
            model(input_ids=batch.input_ids)

    def compressing(name: str) -> Callable[[], object]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                context = Context(scratch=Path(scratch))
                methods.configure(name, {}).compress(load(), tokenizer, Budget(ratio=0.7), calibration, context)

        return run

    others = {name: compressing(name) for name in methods.names() if name != "dense"}
    show(interleaved({"one pass": one_pass, **others}, repeats))


def experts(repeats: int) -> None:
    """How long an MLP of experts takes beside the dense one."""
    from benchmarks import moe_speed

    moe_speed.report(repeats)


def constructions(repeats: int) -> None:
    """How long an MLP takes that a method has cut into experts."""
    from benchmarks import construction_speed

    construction_speed.report(repeats)


def decode(tokens: int) -> None:
    """How long a token takes to decode, dense and sparse."""
    from benchmarks import decode_speed

    decode_speed.report(tokens)


def evaluator(repeats: int) -> None:
    """How long tasks take to score, beside stock lm-eval."""
    from benchmarks import evaluator_speed

    evaluator_speed.report(repeats)


def speed(times: int) -> None:
    """How far repetitions of the speed task are from each other."""
    from benchmarks.speed import noise

    noise.report(times)


def training(repeats: int) -> None:
    """How long a step of training takes beside a forward pass."""
    from benchmarks import training_cost

    training_cost.report(repeats)


def report(copies: int) -> None:
    """How long a report takes, of few records and of many."""
    from benchmarks import report_speed

    report_speed.report(copies)


def kill(times: int, seed: int = 0) -> None:
    """Kill a run `times` times, let it finish, and compare its records with those of an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        began = time.perf_counter()
        finish([*MATRIX, "--out", str(whole)])
        longest = (time.perf_counter() - began) / 4
        moments = finish_with_kills(MATRIX, killed, times, longest, seed)
        same = results(whole) == results(killed)
        print(f"{len(results(whole))} records; killed after {', '.join(f'{at:.1f}' for at in moments)} s; ", end="")
        print("metrics equal bit for bit" if same else "METRICS DIFFER")
        if not same:
            raise SystemExit(1)


def kill_at(arguments: Sequence[str], delay: float) -> bool:
    """Start a run and SIGKILL it `delay` seconds after its first sign of life; whether it was still running.

    Its cells must end with it.
    """
    import psutil

    with start(arguments) as process:
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(delay)
        if process.poll() is not None:
            return False
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=15)
        assert not alive, f"cells outlived their run: {alive}"
    return True


def finish_with_kills(matrix: Sequence[str], out: Path, times: int, longest: float, seed: int) -> list[float]:
    """Kill a run `times` times while it runs, at random moments up to `longest` seconds, then let it finish.

    Returns:
        The moments. A run that ends before its moment does not count, and the matrix starts over.
    """
    arguments, chance, moments = [*matrix, "--out", str(out)], random.Random(seed), []
    while len(moments) < times:
        delay = chance.uniform(0, longest)
        if kill_at(arguments, delay):
            moments.append(delay)
        else:
            shutil.rmtree(out)
    finish(arguments)
    return moments


def results(out: Path) -> dict[str, object]:
    """By cell: status, sizes and metrics, all that must not depend on what happened on the way. Speeds do."""
    return {
        record["cell"]["id"]: (
            record["status"],
            record["size"],
            {name: value for name, value in record["metrics"].items() if not name.startswith("speed/")},
        )
        for record in store.records(out)
    }


CHECKS: dict[str, tuple[Callable[[int], None], int]] = {
    "startup": (startup, 7),
    "methods": (compress, 5),
    "experts": (experts, 5),
    "constructions": (constructions, 5),
    "decode": (decode, 40),
    "evaluator": (evaluator, 3),
    "speed": (speed, 5),
    "training": (training, 5),
    "report": (report, 10),
    "kill": (kill, 20),
}
"""By name: what to run, and how many times."""


def main() -> None:
    """Parse the command line and run one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = parser.add_subparsers(dest="check", required=True)
    for name, (_, times) in CHECKS.items():
        checks.add_parser(name).add_argument("--times", type=int, default=times)
    arguments = parser.parse_args()
    CHECKS[arguments.check][0](arguments.times)


if __name__ == "__main__":
    main()
