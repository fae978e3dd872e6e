"""Several processes: which device each takes, on a machine that has none. (Whole runs: tests/methods/tomoe.)"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch

from benchmarks import checkpoint, launch, plan
from methods.errors import UserError
from tests.benchmarks.test_plan import request


@pytest.fixture
def processes(monkeypatch) -> list[dict[str, Any]]:
    """The second of two processes on a machine with two devices; what they meet with."""
    met: list[dict[str, Any]] = []

    def state(**arguments: Any) -> SimpleNamespace:
        met.append(arguments)
        return SimpleNamespace(device=torch.device("cpu" if arguments["cpu"] else "cuda", 0 if arguments["cpu"] else 1))

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return met


@pytest.mark.parametrize("asked, own", [("cuda", "cuda:1"), ("cpu", "cpu")])
def test_each_process_has_its_own_device(asked: str, own: str, processes: list[dict[str, Any]]) -> None:
    assert launch.own_device(asked) == own
    assert processes == [{"cpu": asked == "cpu", "timeout": launch.PATIENCE}]


@pytest.mark.parametrize("asked, count", [("cuda", 1), ("cuda:1", 0), ("mps", 0)])
def test_a_process_without_a_device_says_so(asked: str, count: int, processes, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=f"--device {asked}: 2 processes were launched.*of these there are {count}"):
        launch.own_device(asked)
    assert not processes


@pytest.mark.parametrize("asked", ["auto", "cuda:1", "mps"])
def test_without_a_launcher_the_device_is_the_one_asked_for(asked: str, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launch.own_device(asked) == asked


def test_a_helper_works_on_its_own_device(monkeypatch) -> None:
    (job,) = plan.jobs(request("--methods", "dense", "--ratios", "0.5"))
    announced, helped = iter([replace(job, device="cuda:0").to_json(), None]), []
    monkeypatch.setattr(launch, "_from_main", lambda text: next(announced))
    monkeypatch.setattr(checkpoint, "assist", helped.append)
    assert launch.help_out("cuda:1") == 0
    assert helped == [replace(job, device="cuda:1")]
