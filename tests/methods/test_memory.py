"""Methods that work block by block stay below a hard limit of memory that the statistics of all blocks would break."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 80_000_000
"""Bytes beyond what the program takes with its model: room for some F^2 of fp64 (8.4 MB each), not for 16."""
CHILD = """
import resource, sys
from pathlib import Path
import torch
from tests.methods.tiny import RandomCalibration, logits, tiny_model
import methods
from methods import modeling
from methods.base import Budget, Context

name, scratch, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
calibration = RandomCalibration(samples=24, window=64)
budget = Budget(ratio=0.7, basis="block", tolerance=0.2)
sizes = {"dtype": torch.float32, "num_hidden_layers": 16, "intermediate_size": 1024}
warm = tiny_model("llama-gqa", dtype=torch.float32)
if name in methods.names():  # libraries take their own memory on first use
    context = Context(scratch=scratch)
    methods.configure(name, {}).compress(warm, None, budget, RandomCalibration(samples=16), context)
model = tiny_model("llama-gqa", **sizes)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(status["VmData"].split()[0]) + limit,) * 2)
if name == "all at once":
    held = [torch.zeros(1024, 1024, dtype=torch.float64) + 1 for _ in modeling.Decoder(model).layers]
else:
    found = methods.configure(name, {}).compress(model, None, budget, calibration, Context(scratch=scratch))
    assert logits(found).isfinite().all()
print("done")
"""


def run(name: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Compress a model of 16 blocks of 1,024 channels under the limit."""
    command = [sys.executable, "-c", CHILD, name, str(scratch), str(LIMIT)]
    # The stacks of other threads would count, and so would freed memory that the allocator keeps for later.
    plain = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | plain, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
@pytest.mark.parametrize("name", ["shortgpt", "slicegpt", "sleb", "modegpt", "magnitude", "wanda", "sparsegpt"])
def test_below_a_hard_limit(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
def test_the_limit_is_one(tmp_path: Path) -> None:
    done = run("all at once", tmp_path)
    assert done.returncode != 0 and "allocate memory" in done.stderr
