"""Methods that work block by block stay below a hard limit of memory that what they hold of one block, of all blocks
at once, would break: statistics, or, where weights are pruned one by one, dense matrices of projections or the order of
their weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 80_000_000
"""Bytes beyond what the program takes with its model: room for some F^2 of fp64 (8.4 MB each), not for 16, nor for the
projections of 16 blocks of 512 channels (151 MB). SparseGPT needs 42 MB of it there, Wanda 27, magnitude 14."""
WIDE = ["magnitude", "wanda", "sparsegpt"]
"""Whose statistics are small beside the projections of a wide model."""
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
width = int(sys.argv[4])
sizes = {"dtype": torch.float32, "num_hidden_layers": 16, "intermediate_size": 1024, "hidden_size": width}
warm = tiny_model("llama-gqa", dtype=torch.float32)
if name in methods.names():  # libraries take their own memory on first use
    context = Context(scratch=scratch)
    methods.configure(name, {}).compress(warm, None, budget, RandomCalibration(samples=16), context)
model = tiny_model("llama-gqa", **sizes)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
free = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(status["VmData"].split()[0]) + limit, free[1]))
layers = modeling.Decoder(model).layers
if name == "all statistics":
    held = [torch.zeros(1024, 1024, dtype=torch.float64) + 1 for _ in layers]
elif name == "all matrices":
    held = [parameter + 1 for layer in layers for parameter in layer.module.parameters()]
else:
    found = methods.configure(name, {}).compress(model, None, budget, calibration, Context(scratch=scratch))
    resource.setrlimit(resource.RLIMIT_DATA, free)  # whoever runs a sparse model makes its matrices
    assert logits(found).isfinite().all()
print("done")
"""


def run(name: str, width: int, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Compress a model of 16 blocks of 1,024 channels and a hidden size of `width` under the limit."""
    command = [sys.executable, "-c", CHILD, name, str(scratch), str(LIMIT), str(width)]
    # The stacks of other threads would count, and so would freed memory that the allocator keeps for later.
    plain = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | plain, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
@pytest.mark.parametrize("name", ["shortgpt", "slicegpt", "sleb", "modegpt", *WIDE])
def test_below_a_hard_limit(name: str, tmp_path: Path) -> None:
    done = run(name, 512 if name in WIDE else 32, tmp_path)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
@pytest.mark.parametrize(("held", "width"), [("all statistics", 32), ("all matrices", 512)])
def test_the_limit_is_one(held: str, width: int, tmp_path: Path) -> None:
    done = run(held, width, tmp_path)
    assert done.returncode != 0 and "allocate memory" in done.stderr
