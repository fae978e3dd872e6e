"""Energy counters: sockets and their wrapping, and no figure where there is none."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import speed
from benchmarks.presets import PRESETS
from benchmarks.speed import energy, generation
from benchmarks.speed.energy import Counter, counter
from benchmarks.speed.roofline import Ceilings
from methods.base import Silent
from tests.methods.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def sockets(tmp_path, monkeypatch):
    """Two sockets, the first with a part; returns what sets their readings."""
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1", "dtpm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("9999999\n")

    def reads(*readings):
        for name, reading in zip(("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"), readings, strict=True):
            (tmp_path / name / "energy_uj").write_text(f"{reading}\n")

    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return reads


def test_sockets_add_up_and_wrap(sockets):
    sockets(9_000_000, 1_000_000, 5)
    found = counter(CPU)
    assert found is not None
    before = found.read()
    sockets(500_000, 3_000_000, 400_000)
    assert found.between(before, found.read()) == pytest.approx(1.5 + 2.0, rel=1e-9)


def test_no_counter_where_none_can_be_read(sockets, tmp_path, monkeypatch):
    assert counter(CPU) is None  # the readings are missing, as if they were not for us
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nothing")
    assert counter(CPU) is None
    assert counter(torch.device("meta")) is None


class NVMLError(Exception):
    pass


def nvml(total):
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )


def test_a_device_counts_millijoules(monkeypatch):
    totals = {"GPU-abc": iter([0, 1000, 4500])}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(lambda handle: next(totals[handle])))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    found = counter(torch.device("cuda"))
    assert found is not None and found.between(found.read(), found.read()) == 3.5


def test_a_device_may_have_no_counter(monkeypatch):
    def refuse(handle):
        raise NVMLError

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(refuse))
    assert counter(torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert counter(torch.device("cuda")) is None


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(speed, "ceilings", lambda device, dtype: Ceilings(1e9, 1e9))
    monkeypatch.setattr(speed, "TURN_S", 0.0)
    return tiny_model("llama-gqa", dtype=torch.float32)


def test_joules_per_token(model, monkeypatch):
    """Every reading is 12 J after the last, so that a prompt takes 12 J and so do the tokens after it."""
    readings = iter(range(0, 10_000, 12))
    monkeypatch.setattr(speed, "counter", lambda device: Counter(lambda: (next(readings),), 1))
    settings = PRESETS["smoke"]
    metrics = speed.measure(model, None, settings, Silent())
    assert metrics["speed/prefill_joules_per_token@b1"].value == pytest.approx(12 / settings.speed_prompt)
    assert metrics["speed/decode_joules_per_token@b1"].value == pytest.approx(12 / settings.speed_new_tokens)


def test_without_a_counter_there_is_no_metric(model, monkeypatch):
    monkeypatch.setattr(speed, "counter", lambda device: None)
    assert not [name for name in speed.measure(model, None, PRESETS["smoke"], Silent()) if "joules" in name]
    assert generation.run(model, torch.zeros(1, 2, dtype=torch.int64), 1).prefill_j is None
