"""Identities of cells, the matrix, and that planning stays light."""

import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cli, plan, preview
from benchmarks.job import Cell, Job, Source
from benchmarks.plan import PRESETS, Request
from methods.errors import UserError

CELL = Cell(
    model="m",
    fingerprint="f",
    method="slicegpt",
    method_config={"a": 1, "b": "x"},
    ratio=0.5,
    ratio_basis="total",
    seed=0,
    calibration=Source(name="text", samples=4, window=128),
    budget=PRESETS["smoke"],
    dtype="float32",
)
CHANGES: dict[str, Any] = {
    "model": "n",
    "fingerprint": "g",
    "method": "shortgpt",
    "method_config": {"a": 2, "b": "x"},
    "ratio": 0.25,
    "ratio_basis": "block",
    "seed": 1,
    "calibration": Source(name="text", samples=4, window=64),
    "budget": replace(PRESETS["smoke"], documents=9),
    "dtype": "bfloat16",
    "recover": {"kind": "lora", "rank": 8},
}


def request(*arguments: str) -> Request:
    """The request of a command line on a hub model, which planning must know without a hub."""
    line = ["--models", "llama2-7b", "--device", "cpu", *arguments]
    return cli.request(cli.parser().parse_args(line), line)


def test_every_field_has_a_change_to_try() -> None:
    assert set(CHANGES) == {field.name for field in fields(Cell)}


@given(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1))
def test_any_changed_field_changes_the_id(names: set[str]) -> None:
    assert replace(CELL, **{name: CHANGES[name] for name in names}).id != CELL.id


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)), st.randoms())
def test_the_order_of_hyperparameters_does_not_matter(config: dict[str, Any], random: Any) -> None:
    items = list(config.items())
    random.shuffle(items)
    assert replace(CELL, method_config=config).id == replace(CELL, method_config=dict(items)).id


def test_ids_do_not_drift() -> None:
    """A changed id orphans every committed record: only a change of the schema or of a preset may do that."""
    assert CELL.id == "27fa52cc74d6"


@settings(deadline=None, max_examples=25)
@given(
    ratios=st.lists(st.sampled_from(["0.5", "0.6", "0.7", "0.8"]), min_size=1),
    seeds=st.lists(st.integers(0, 5), min_size=1),
    methods=st.lists(st.sampled_from(["dense", "shortgpt", "slicegpt"]), min_size=1),
)
def test_the_matrix(ratios: list[str], seeds: list[int], methods: list[str]) -> None:
    jobs = plan.jobs(request("--ratios", *ratios, "--seeds", *map(str, seeds), "--methods", *methods))
    cells = [job.cell for job in jobs]
    assert len(cells) == 1 + len(set(ratios)) * len(set(seeds)) * len(set(methods) - {"dense"})
    assert [cell.method for cell in cells].count("dense") == 1 == cells[0].ratio
    assert len({cell.id for cell in cells}) == len(cells)


def test_the_dense_cell_does_not_depend_on_the_rest_of_the_run() -> None:
    one = plan.jobs(request("--ratios", "0.5"))[0]
    other = plan.jobs(request("--ratios", "0.8", "--seeds", "3", "--ratio-basis", "block", "--calibration", "c4"))[0]
    assert one.cell == other.cell


def test_a_job_survives_its_journey_to_the_child() -> None:
    for job in plan.jobs(request("--ratios", "0.5", "--set", "shortgpt.metric=angular")):
        assert Job.from_json(job.to_json()) == job


def test_windows_are_cut_to_the_limit_of_the_model(inputs: Path) -> None:
    jobs = plan.jobs(request("--models", str(inputs / "model"), "--ratios", "0.75", "--ratio-tolerance", "0.2"))
    assert {job.cell.calibration.window for job in jobs if job.cell.calibration} == {128}


@pytest.mark.parametrize("name", ["", "{text}"])
def test_calibration_windows_can_be_asked_for(workplace: Path, name: str) -> None:
    asked = name.format(text=workplace / "text.txt")
    asking = ("--calibration", f"{asked}:5x96")
    default, plain = (plan.jobs(request("--ratios", "0.8", *more))[1] for more in ((), asking))
    source = plain.cell.calibration
    assert source is not None and (source.samples, source.window) == (5, 96)
    assert (plain.source == default.source) == (not name) and plain.cell.id != default.cell.id
    with pytest.raises(UserError, match=r"0 windows of 96 tokens.*:1x4096"):
        plan.jobs(request("--ratios", "0.8", "--calibration", f"{asked}:0x96"))
    with pytest.raises(UserError, match=r"5 windows of 4097 tokens.*:5x4096"):
        plan.jobs(request("--ratios", "0.8", "--calibration", f"{asked}:5x4097"))


def test_a_changed_calibration_file_makes_another_cell(workplace: Path) -> None:
    text = workplace / "text.txt"
    before = plan.jobs(request("--ratios", "0.5", "--calibration", str(text)))
    text.write_text(text.read_text() + "\nmore")
    after = plan.jobs(request("--ratios", "0.5", "--calibration", str(text)))
    same = [a.cell.id == b.cell.id for a, b in zip(before, after, strict=True)]
    assert same == [True, *[False] * (len(cli.DEFAULT_METHODS) - 1)]  # the dense cell takes no calibration


def test_a_set_for_a_method_that_does_not_run_is_an_error() -> None:
    with pytest.raises(UserError, match="Add it to --methods"):
        plan.jobs(request("--ratios", "0.5", "--methods", "slicegpt", "--set", "shortgpt.metric=angular"))


def test_the_dtype_follows_the_device() -> None:
    assert plan.dtype_of("auto", "cpu") == "float32"
    assert plan.dtype_of("auto", "cuda:1") == "bfloat16"
    assert plan.dtype_of("float16", "cpu") == "float16"


def test_a_hidden_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *arguments: ["/dev/nvidia0"])
    monkeypatch.setattr(plan, "version", lambda package: "2.13.0+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan.device_of("auto") == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan.device_of("auto") == "cpu"


def test_the_preview_says_sizes_states_and_margins() -> None:
    text = preview.table(plan.jobs(request("--ratios", "0.5", "--budget", "demo")))
    count = len(cli.DEFAULT_METHODS)
    assert "6,738,415,616" in text and "to do" in text and f"{count} cells, {count} to do" in text
    assert "±15.5" in text and "Average of the 5 tasks of zeroshot: ±6.9." in text


def test_the_preview_reckons_with_what_a_method_does() -> None:
    """Shots, rounds and training steps, not only the calibration text."""

    def time(*settings: str, budget: str = "paper") -> float:
        more = ("--set", *settings) if settings else ()
        argv = request("--ratios", "0.7", "--methods", "llm-surgeon", "sleb", "llm-pruner", "--budget", budget, *more)
        return sum(preview.seconds(job) or 0 for job in plan.jobs(argv))

    plain = time()
    assert time("llm-surgeon.shots=80") - plain == pytest.approx(plain - time("llm-surgeon.shots=1"), rel=0.05)
    assert time("sleb.rescore=false") < plain < time("llm-pruner.preset=matched")
    trained = [
        preview.seconds(plan.jobs(request("--ratios", "0.7", "--methods", "tomoe", "--set", f"tomoe.steps={n}"))[1])
        for n in (1000, 2000, 3000)
    ]
    assert trained[2] - trained[1] == pytest.approx(trained[1] - trained[0])


def test_margins_and_durations() -> None:
    assert preview.margin([10_000]) == pytest.approx(0.98)
    assert [preview.duration(s) for s in (None, 59, 90, 7200, 172800)] == ["?", "59 s", "1.5 min", "2.0 h", "2.0 d"]


def test_planning_and_listing_need_no_torch(tmp_path: Path) -> None:
    plan_ = ["--models", "llama2-7b", "--ratios", "0.5", "--plan", "--out", str(tmp_path)]
    code = (
        f"import sys, run_all; assert run_all.main(['--list', 'models']) == 0 and run_all.main({plan_}) == 0; "
        "heavy = {'torch', 'transformers', 'datasets', 'lm_eval', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_presets_hold_what_their_names_promise() -> None:
    paper = PRESETS["paper"]
    assert (paper.calibration_samples, paper.calibration_window) == (128, 2048)
    assert (paper.ppl_windows, paper.documents, paper.ppl_lengths) == (None, None, (2048, 4096))
    assert all(asdict(preset)["name"] == name for name, preset in PRESETS.items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "pruner-zero"])
def test_adapters_that_would_fill_zeros_are_refused_before_anything_runs(method: str) -> None:
    arguments = ["--ratios", "0.519", "--methods", "shortgpt", method, "--ratio-tolerance", "0.05"]
    assert len(plan.jobs(request(*arguments))) == 3
    with pytest.raises(UserError, match="would fill the zeros.*leave out --recover"):
        plan.jobs(request(*arguments, "--recover", "lora"))
