"""Kill a run again and again, and see what it comes to: for tests, and for longer trials by hand."""

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

import run_all
from benchmarks import store

ROOT = Path(run_all.__file__).parent


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start `run_all.py` with plain progress lines on a pipe."""
    command = [sys.executable, "run_all.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def kill_at(arguments: Sequence[str], delay: float) -> None:
    """Start a run and SIGKILL it `delay` seconds after a cell first said something; its cells must end with it."""
    with start(arguments) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not line.startswith("cells:"):
                break
        time.sleep(delay)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=15)
        assert not alive, f"cells outlived their run: {alive}"


def finish(arguments: Sequence[str]) -> None:
    """Run to the end, which must be a good one."""
    subprocess.run([sys.executable, "run_all.py", *arguments], cwd=ROOT, check=True, capture_output=True)


def finish_with_kills(arguments: Sequence[str], kills: int, longest: float, seed: int) -> None:
    """Kill a run `kills` times, each up to `longest` seconds after its first sign of life, then let it finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        kill_at(arguments, moments.uniform(0, longest))
    finish(arguments)


def results(out: Path) -> dict[str, object]:
    """By cell: sizes and metrics, all that must not depend on what happened on the way. Speeds do."""
    return {
        record["cell"]["id"]: (
            record["status"],
            record["size"],
            {name: value for name, value in record["metrics"].items() if not name.startswith("speed/")},
        )
        for record in store.records(out)
    }
