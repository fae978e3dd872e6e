"""Training in two processes (gloo): what both share, what differs, what one of them alone does.

    accelerate launch --multi_gpu --num_processes 2 --module tests.methods.tomoe.test_parallel FOLDER

is what the tests start, once; each process leaves its tensors in a folder, and the tests look at them. `--multi_gpu` is
how accelerate starts several processes on one machine; whether they compute on its processors is the program's to say
(`--cpu` would start a single one where there is no MPI).
"""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import store
from methods.base import Budget
from methods.tomoe import ToMoE, training
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.training import Trainer
from methods.training import loop
from tests.benchmarks.small_run import arguments, make_model, make_text
from tests.methods.tiny import tiny_model
from tests.methods.training.small import SmallCalibration, context, tokenizer

STEPS = 4
ROOT = Path(__file__).parents[3]
# All that accelerate would otherwise take from its user's settings; port 0 is any free one.
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def trainer(folder: Path, start: Literal["random", "energy"] = "random") -> Trainer:
    method, model = ToMoE(experts=3, embedding=4, start=start), tiny_model("llama-gqa", dtype=torch.float32)
    where = context(folder / "scratch", steps=STEPS, artifacts=folder)
    return Trainer(method, model, tokenizer(), Budget(ratio=0.6, basis="block"), SmallCalibration(), where)


@contextmanager
def changed_terms(change: Any) -> Iterator[None]:
    """While open, `change(call, ids, terms)` stands between the objective and the backward pass."""
    terms, calls = Trainer._terms, iter(range(1000))
    Trainer._terms = lambda self, ids, *args: change(next(calls), ids, terms(self, ids, *args))  # pyright: ignore
    try:
        yield
    finally:
        Trainer._terms = terms


def flat_gradients(made: Trainer, into: list[Tensor]) -> None:
    """Have the gradients of every optimiser step collected."""

    def see(*_: Any) -> None:
        gradients = {name: parameter.grad for name, parameter in made.network.trained().items()}
        into.append(torch.cat([g.flatten() for _, g in sorted(gradients.items()) if g is not None]))

    made.loop.optimizer.register_step_pre_hook(see)


def train_whole(folder: Path) -> dict[str, Tensor]:
    """An undisturbed run: first gradients, first batch, what noise comes next, trained tensors."""
    made, gradients, seen = trainer(folder), [], {}

    def see(call: int, ids: Tensor, terms: Any) -> Any:
        seen.setdefault("ids", ids.clone())
        seen.setdefault("next noise", torch.rand(8))
        return terms

    flat_gradients(made, gradients)
    with changed_terms(see):
        made.run()
    return seen | {"gradient": gradients[0]} | made.network.state_dict()


def train_killed(folder: Path) -> dict[str, Tensor]:
    """A run that ends in its third step, and the one that resumes it."""
    loop.SAVE_SECONDS = 0.0

    def stop(call: int, ids: Tensor, terms: Any) -> Any:
        if call == 2:
            raise KeyboardInterrupt
        return terms

    with changed_terms(stop), pytest.raises(KeyboardInterrupt):
        trainer(folder).run()
    PartialState().wait_for_everyone()
    made = trainer(folder)
    made.run()
    return made.network.state_dict()


def train_with_one_bad_loss(folder: Path) -> dict[str, Tensor]:
    """A run in which the second process alone gets a loss that is no number, in the second step."""

    def spoil(call: int, ids: Tensor, terms: Any) -> Any:
        factor = float("nan") if call == 1 and PartialState().process_index == 1 else 1.0
        return type(terms)(**{**vars(terms), "loss": terms.loss * factor})

    made = trainer(folder)
    with changed_terms(spoil):
        made.run()
    return {"skipped": torch.tensor(made.loop.state.skipped)} | made.network.state_dict()


def begin_unevenly(folder: Path) -> dict[str, Tensor]:
    """The network of the first step, after each process has found another start than the main one."""
    begin, rank = training.begin, PartialState().process_index
    made, first = trainer(folder, "energy"), {}

    def uneven(network: ToMoENetwork, *args: Any) -> None:
        begin(network, *args)
        for tensor in network.state_dict().values():
            tensor += 1e-3 * rank

    def see(call: int, ids: Tensor, terms: Any) -> Any:
        for name, tensor in made.network.state_dict().items():
            first.setdefault(name, tensor.clone())
        return terms

    training.begin = uneven
    with changed_terms(see):
        made.run()
    training.begin = begin
    return first


RUNS = {"whole": train_whole, "killed": train_killed, "bad": train_with_one_bad_loss, "start": begin_unevenly}


def main(folder: Path) -> None:
    """One of the processes."""
    for name, run in RUNS.items():
        result = run(folder / name)
        save_file(result, folder / f"{name}-{PartialState().process_index}.safetensors")
    PartialState().destroy_process_group()


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a Python program, which must come to an end."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their results."""
    folder = tmp_path_factory.mktemp("parallel")
    done = launched("--module", __name__, str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def both(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]


def network_of(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in result.items() if "." in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(tensor.equal(other[name]) for name, tensor in network_of(one).items())


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_hold_the_same_network(folder: Path, name: str) -> None:
    one, other = both(folder, name)
    assert "hypernetwork.z_SNI" in network_of(one)
    assert same(one, other)


def test_each_process_has_its_own_text_and_noise(folder: Path) -> None:
    one, other = both(folder, "whole")
    assert not one["ids"].equal(other["ids"])
    assert not one["next noise"].equal(other["next noise"])


def test_two_processes_train_something_else_than_one(folder: Path, tmp_path: Path) -> None:
    alone, (together, _) = trainer(tmp_path), both(folder, "whole")
    alone.run()
    assert alone.network.hypernetwork.z_SNI.equal(together["hypernetwork.z_SNI"])
    assert not same(alone.network.state_dict(), together)


def test_the_gradient_is_the_mean_of_what_each_process_computes(folder: Path, tmp_path: Path) -> None:
    """One process plays both parts in turn."""
    parts: list[Tensor] = []
    for rank in range(2):
        made = trainer(tmp_path / str(rank))
        made.loop.process = SimpleNamespace(num_processes=2, process_index=rank)  # pyright: ignore
        flat_gradients(made, parts)
        with made.masked.attached():
            made.loop.step(0, next(made.loop.batches()))
    assert not torch.allclose(parts[0], parts[1])
    for result in both(folder, "whole"):
        torch.testing.assert_close(result["gradient"], (parts[0] + parts[1]) / 2)


def test_one_process_writes(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "whole" / "training.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(STEPS)]
    assert [path.name for path in (folder / "whole" / "scratch" / "tomoe").iterdir()] == ["final"]


def test_resumed_equals_uninterrupted(folder: Path) -> None:
    assert same(both(folder, "killed")[0], both(folder, "whole")[0])


def test_a_bad_loss_in_one_process_skips_the_step_in_all(folder: Path) -> None:
    results = both(folder, "bad")
    assert [int(result["skipped"]) for result in results] == [1, 1]
    assert all(tensor.isfinite().all() for tensor in network_of(results[0]).values())
    assert not same(results[0], both(folder, "whole")[0])


def trained_run(folder: Path, *more: str, methods: tuple[str, ...] = ("tomoe",)) -> list[str]:
    """A command line that trains two cells of each method for two steps."""
    what = ["--methods", *methods, "--ratios", "0.7", "0.6", "--ratio-basis", "block", "--set", "tomoe.experts=2"]
    steps = [word for method in methods for word in ("--set", f"{method}.steps=2")]
    return ["run_all.py", *arguments(folder, *what, *steps, *more)]


def test_a_launched_run_leaves_one_record_per_cell_of_what_all_processes_trained(tmp_path: Path) -> None:
    make_model(tmp_path / "model"), make_text(tmp_path / "text.txt")
    done = launched(*trained_run(tmp_path, methods=("disp-llm", "tomoe")))
    assert done.returncode == 0, done.stderr
    made = [(record["cell"]["method"], record["status"]) for record in store.records(tmp_path / "out")]
    assert made == [("dense", "done"), *[("disp-llm", "done")] * 2, *[("tomoe", "done")] * 2]
    logs = [path.read_text().splitlines() for path in (tmp_path / "out").rglob("training.csv")]
    # Steps of both processes' two sequences of 128.
    assert [[row["batch_tokens"] for row in csv.DictReader(log)] for log in logs] == [["512", "512"]] * 4


def test_a_launched_run_ends_when_a_cell_fails_in_all_processes(tmp_path: Path) -> None:
    make_model(tmp_path / "model"), make_text(tmp_path / "text.txt")
    # One byte less than eight different windows of 128 need, which only a tokenizer can tell.
    (tmp_path / "short.txt").write_text("ab " * 44 + "ab")
    done = launched(*trained_run(tmp_path, "--calibration", str(tmp_path / "short.txt")))
    assert done.returncode == 1, done.stderr
    assert "3 cells: 1 done, 1 not started, 1 failed." in done.stdout
    made = [(record["cell"]["method"], record["status"]) for record in store.records(tmp_path / "out")]
    assert made == [("dense", "done"), ("tomoe", "failed")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
