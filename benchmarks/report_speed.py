"""How long a report takes: of the committed records, and of many that are copies of them.

python -m benchmarks.selfcheck report --times 10     # copies; each has 193 records or more
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SEEDS = 100
"""More than the committed records have."""


def report(copies: int) -> None:
    """Print a line for the committed records and one for the copies."""
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder, "results")
        for number in range(copies):
            _copy(many / str(number), number)
        for results in (RESULTS, many):
            count, seconds = len(list(results.rglob("record.json"))), _seconds(results, Path(folder, "report"))
            print(f"{count:5} records {seconds:6.1f} s")


def _copy(to: Path, number: int) -> None:
    """The committed results as those of two models each, every second copy with other seeds."""
    shutil.copytree(RESULTS, to)
    for path in to.rglob("record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        cell = record["cell"]
        cell["id"] += f"-{number}"
        cell["model"] += f"-{number % 2}"
        cell["seed"] += SEEDS * number
        path.write_text(json.dumps(record), encoding="utf-8")


def _seconds(results: Path, out: Path) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "reports", "--results", str(results), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
