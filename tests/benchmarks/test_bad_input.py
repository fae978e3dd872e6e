"""Whatever the user gets wrong is said in one paragraph, with status 2, before any work, leaving nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import run_all
from benchmarks import checks, cli, plan
from methods.errors import UserError
from tests.benchmarks import small_run

BASE = {"--models": "llama2-7b", "--ratios": "0.5", "--device": "cpu"}
CASES = [
    ({"--models": "llama2-7"}, ["llama2-7b"]),
    ({"--models": None}, ["--models"]),
    ({"--models": "/no/such/directory"}, ["/no/such/directory"]),
    ({"--methods": "slicegtp"}, ["Did you mean slicegpt", "--list methods"]),
    ({"--tasks": "arc_esay"}, ["arc_easy"]),
    ({"--tasks": "ppl:wikitext3"}, ["wikitext2"]),
    ({"--set": "slicegpt.rund=8"}, ["slicegpt", "Use --set slicegpt.FIELD=VALUE"]),
    ({"--set": "slicegpt"}, ["METHOD.FIELD=VALUE"]),
    ({"--set": "shortgpt.metric=cosine"}, ["block_influence"]),
    ({"--ratios": None}, ["--ratios 0.5"]),
    ({"--ratios": "1.5"}, ["outside (0, 1]", "--ratios 0.5"]),
    ({"--ratios": "0"}, ["outside (0, 1]"]),
    ({"--ratios": "nan"}, ["outside (0, 1]"]),
    ({"--ratios": "0.001", "--methods": "shortgpt"}, ["not reachable for shortgpt", "Use --ratios"]),
    ({"--ratios": "0.51", "--ratio-tolerance": "0.001", "--methods": "shortgpt"}, ["--ratio-tolerance"]),
    ({"--calibration": "wikitext"}, ["wikitext2"]),
    ({"--calibration": "/no/such.txt"}, ["/no/such.txt"]),
    ({"--calibration": "moby-dick"}, ["no calibration split"]),
    ({"--executor": "ray"}, ["inline", "process", "not part of this version"]),
    ({"--workers": "0"}, ["--workers 1"]),
    ({"--device": "gpu"}, ["--device cpu"]),
    ({"--device": "gpu", "--plan": ""}, ["--device cpu"]),
    ({"--device": "cuda"}, ["--device cpu"]),
    ({"--device": "cuda:7"}, ["--device cpu", "0 cuda devices"]),
    ({"--out": "/proc/nowhere"}, ["--out"]),
    ({"--offline": ""}, ["meta-llama/Llama-2-7b-hf"]),
]


@pytest.fixture(autouse=True)
def no_cuda_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "has_accelerator", lambda: False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("changes", "said"), CASES, ids=lambda value: str(value)[:60])
def test_bad_input(
    changes: dict[str, str | None], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**BASE, "--out": str(tmp_path / "out"), **changes}
    line = [word for option, value in options.items() if value is not None for word in (option, *value.split())]
    assert run_all.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_all.py: ") and error.count("\n") == 1 and "Traceback" not in error
    assert all(part in error for part in said), error
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("log.txt"))


def test_the_program_itself_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "run_all.py", "--models", "tiny-lama", "--ratios", "0.5", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(run_all.__file__).parent)
    assert done.returncode == 2 and "tiny-llama" in done.stderr and "Traceback" not in done.stderr


def test_a_directory_without_weights(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "model" / "model.safetensors").unlink()
    assert small_run.run(workplace) == 2
    assert "no weights" in capsys.readouterr().err


def test_a_checkpoint_of_a_newer_schema(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = workplace / "model" / "config.json"
    config.write_text(re.sub(r"^\{", '{"compression": {"schema": 99},', config.read_text()))
    assert small_run.run(workplace) == 2
    assert "schema 99" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_calibration_text(text: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "empty.txt").write_text(text)
    assert small_run.run(workplace, "--calibration", str(workplace / "empty.txt")) == 2
    assert "empty" in capsys.readouterr().err


def test_an_empty_method_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--models", "llama2-7b", "--ratios", "0.5", "--methods", ""]) == 2
    assert "unknown method ''" in capsys.readouterr().err


def test_a_calibration_text_too_short_for_the_windows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "short.txt").write_text("a few words\nand a few more\n")
    assert small_run.run(workplace, "--calibration", str(workplace / "short.txt")) == 2
    assert "too few for 8 different windows of 128" in capsys.readouterr().err


def test_a_damaged_record(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = small_run.arguments(workplace)
    job = plan.jobs(cli.request(cli.parser().parse_args(line), line))[1]
    job.folder.mkdir(parents=True)
    job.record.write_text('{"schema": 1')
    assert small_run.run(workplace) == 2
    error = capsys.readouterr().err
    assert f"rm '{job.record}'" in error and not (workplace / "out" / job.cell.model / "dense").exists()


def test_only_evaluate_needs_checkpoints(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run.run(workplace, "--only-evaluate") == 2
    assert "Leave --only-evaluate out" in capsys.readouterr().err


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        checks.check_writable(tmp_path / "file" / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> object:
        return open("/dev/full", "wb")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="No space left"):
        checks.check_writable(tmp_path)


def test_a_disk_too_small_for_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    line = ["--models", "llama2-7b", "--ratios", "0.5", "--device", "cpu", "--out", str(tmp_path)]
    assert run_all.main(line) == 2
    assert "27.0 GB" in capsys.readouterr().err


def test_a_disk_too_small_for_the_kept_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {str(tmp_path): 10**12, str(tmp_path / "kept"): 5 * 10**8}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free[str(path)]})())
    line = ["--models", "llama2-7b", "--ratios", "0.5", "--device", "cpu", "--out", str(tmp_path)]
    line += ["--checkpoints", str(tmp_path / "kept"), "--methods", "shortgpt"]
    jobs = plan.jobs(cli.request(cli.parser().parse_args(line), line))
    with pytest.raises(UserError, match=r"kept has 500 MB free, and the checkpoints to keep need about 40\.4 GB"):
        checks.check_room(jobs, 1)
