"""Fine-tuned cells: rows of their own beside the plain ones, which they start from and leave as they are."""

import json
import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import run_all
from benchmarks import cell, checkpoint, cli, executors, launch, plan, preview, record, recovered, store
from benchmarks.executors import Outcome, chains
from benchmarks.job import Job
from methods.errors import UserError
from methods.recovery import Recovery, settings
from tests.benchmarks import small_run
from tests.benchmarks.test_cell import METRIC, dies, forbidden
from tests.benchmarks.test_plan import CELL, request
from tests.methods.recovery.made_of import needs_peft

pytestmark = needs_peft
SHORT = ("--recover", "lora", "--set", "lora.steps=3", "lora.rank=2")


def records(workplace: Path) -> dict[str, dict[str, Any]]:
    """Records by method, fine-tuned ones by `tuned`."""
    found = store.records(workplace / "out")
    return {"tuned" if one["cell"]["recover"] else one["cell"]["method"]: one for one in found}


def jobs(workplace: Path, *more: str) -> list[Job]:
    """The cells of a command: dense, plain, fine-tuned."""
    argv = small_run.arguments(workplace, *more)
    return plan.jobs(cli.request(cli.parser().parse_args(argv), argv))


@pytest.fixture
def compressions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that have compressed something so far."""
    compress, done = checkpoint._compress, []

    def counted(job: Job, *arguments: Any) -> Any:
        done.append(job.cell.method)
        return compress(job, *arguments)

    monkeypatch.setattr(checkpoint, "_compress", counted)
    return done


@pytest.fixture(scope="module")
def finished_once(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`inputs` with the records of a plain run and of a fine-tuning one that found its checkpoint kept; not to be
    written to."""
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("tuned"), dirs_exist_ok=True)
    assert small_run.run(folder, *SHORT) == 0
    return folder


def test_a_fine_tuned_cell_is_a_record_of_its_own(finished_once: Path) -> None:
    found, recipe = records(finished_once), Recovery(steps=3, rank=2)
    plain, tuned = found["shortgpt"], found["tuned"]
    assert set(found) == {"dense", "shortgpt", "tuned"}
    assert tuned["cell"]["recover"] == recipe.record() and plain["cell"]["recover"] is None
    assert tuned["status"] == "done" and tuned["size"] == plain["size"]
    assert tuned["metrics"][METRIC] != plain["metrics"][METRIC]
    assert tuned["time"]["recover_s"] > 0 and "recover_s" not in plain["time"]
    assert (
        tuned["time"]["compress_s"] == plain["time"]["compress_s"] and tuned["time"]["load_s"] > plain["time"]["load_s"]
    )
    assert tuned["time"]["total_s"] == pytest.approx(sum(tuned["time"].values()) - tuned["time"]["total_s"])
    linears = 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # of three blocks: q and o, k and v, the MLP's
    spent = {"tokens": 3 * 2 * 128, "parameters": 2 * linears, "skipped": 0, "peft": version("peft")}
    assert tuned["provenance"]["recovery"] == spent
    assert plain["provenance"]["recovery"] == {} and tuned["provenance"]["tasks"] == {}
    assert tuned["provenance"]["dataset_revisions"] == plain["provenance"]["dataset_revisions"]
    folders = {path.parent for path in (finished_once / "out").rglob("record.json")}
    assert not any((folder / "scratch").exists() for folder in folders)
    (log,) = (finished_once / "out").rglob("training.csv")
    assert len(log.read_text().splitlines()) == 4 and log.parent.name == tuned["cell"]["id"]


def test_finished_ones_are_skipped(finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    before = records(folder)
    monkeypatch.setattr(cell, "_work", forbidden)
    assert small_run.run(folder, *SHORT) == 0 and small_run.run(folder) == 0
    assert records(folder) == before


def test_what_a_run_compresses_it_compresses_once(workplace: Path, compressions: list[str]) -> None:
    assert small_run.run(workplace, *SHORT) == 0
    assert sorted(compressions) == ["dense", "shortgpt"]


def test_a_plain_cell_of_an_earlier_run_is_compressed_again_if_need_be(
    finished_once: Path, workplace: Path, compressions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small_run.run(workplace) == 0
    before = records(workplace)["shortgpt"]
    compressions.clear()
    monkeypatch.setattr(record, "STARTED", "later")
    assert small_run.run(workplace, *SHORT) == 0
    after = records(workplace)
    assert compressions == ["shortgpt"] and after["shortgpt"] == before
    assert after["tuned"]["metrics"] == records(finished_once)["tuned"]["metrics"]  # the very same model came of it
    assert not list((workplace / "out").rglob("scratch"))


def test_a_kept_plain_checkpoint_is_used(finished_once: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ("--checkpoints", str(workplace / "kept"))
    assert small_run.run(workplace, *kept) == 0
    monkeypatch.setattr(checkpoint, "_compress", forbidden)
    monkeypatch.setattr(record, "STARTED", "later")
    assert small_run.run(workplace, *kept, *SHORT) == 0
    tuned = records(workplace)["tuned"]
    assert tuned["metrics"] == records(finished_once)["tuned"]["metrics"]
    assert tuned["provenance"]["tasks"]["compression"]["started"] != "later" == tuned["provenance"]["started"]
    one, other = (workplace / "kept").glob("*/shortgpt/*/*/checkpoint")
    for folder in (one, other):
        assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3
        assert not (folder / "adapter").exists()


def test_a_killed_fine_tuning_goes_on_without_compressing(
    finished_once: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovered, "recover", dies)
    with pytest.raises(KeyboardInterrupt):
        small_run.run(workplace, *SHORT)
    assert set(records(workplace)) == {"dense", "shortgpt"}
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "_compress", forbidden)
    assert small_run.run(workplace, *SHORT) == 0
    assert records(workplace)["tuned"]["metrics"] == records(finished_once)["tuned"]["metrics"]
    assert not list((workplace / "out").rglob("scratch"))


def test_a_failed_fine_tuning_says_so_and_the_plain_row_stays(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise UserError("no luck")

    monkeypatch.setattr(recovered, "recover", fails)
    assert small_run.run(workplace, *SHORT) == 1
    found = records(workplace)
    assert found["shortgpt"]["status"] == "done"
    assert found["tuned"]["status"] == "failed" and found["tuned"]["error"] == "no luck"


def test_force_does_both_again(workplace: Path, compressions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_run.run(workplace, *SHORT) == 0
    before = records(workplace)
    compressions.clear()
    assert small_run.run(workplace, *SHORT, "--force") == 0
    assert sorted(compressions) == ["dense", "shortgpt"]
    assert {name: found["metrics"] for name, found in records(workplace).items()} == {
        name: found["metrics"] for name, found in before.items()
    }
    assert not list((workplace / "out").rglob("scratch"))


def test_adapters_kept_apart_are_evaluated_and_counted(finished_once: Path, workplace: Path) -> None:
    kept = ("--checkpoints", str(workplace / "kept"))
    assert small_run.run(workplace, *SHORT, "lora.merge=false", *kept) == 0
    plain, tuned = records(workplace)["shortgpt"], records(workplace)["tuned"]
    added = tuned["provenance"]["recovery"]["parameters"]
    for key in ("active_total", "active_block", "distinct_total", "stored_total"):
        assert tuned["size"][key] == plain["size"][key] + added
    assert tuned["size"]["stored_bytes"] >= plain["size"]["stored_bytes"] + 4 * added
    merged = records(finished_once)["tuned"]["metrics"][METRIC]["value"]
    assert tuned["metrics"][METRIC]["value"] == pytest.approx(merged, rel=1e-5)
    assert tuned["metrics"][METRIC] != plain["metrics"][METRIC]
    assert small_run.run(workplace, *SHORT, "lora.merge=false", *kept, "--only-evaluate", "--force") == 0
    assert records(workplace)["tuned"]["metrics"] == tuned["metrics"]


def test_block_basis_counts_blocks(workplace: Path) -> None:
    asked = ("--ratio-basis", "block", "--ratios", "0.75", "--ratio-tolerance", "0.01")
    assert small_run.run(workplace, *SHORT, *asked) == 0
    assert records(workplace)["tuned"]["size"] == records(workplace)["shortgpt"]["size"]
    assert records(workplace)["tuned"]["size"]["on_budget"]


def test_the_plan_shows_both(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run.run(workplace, *SHORT, "--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(" shortgpt " in line for line in lines) and any(" shortgpt + fine-tuning " in line for line in lines)
    dense, plain, tuned = jobs(workplace, "--recover", "lora")
    times = [preview.seconds(job) for job in (plain, tuned)]
    assert times[1] > times[0]  # type: ignore[operator]
    assert (dense.leaves, plain.leaves, tuned.leaves) == (False, True, False)
    assert tuned.plain == replace(plain, leaves=False) and plain.plain is None
    assert Job.from_json(tuned.to_json()) == tuned


def test_chains_are_run_by_one_worker(workplace: Path) -> None:
    dense, plain, tuned = jobs(workplace, "--recover", "lora")
    assert chains([dense, plain, tuned]) == [[dense], [plain, tuned]]
    assert chains([dense, tuned]) == [[dense], [tuned]]
    assert chains([tuned, plain]) == [[tuned], [plain]]


def test_a_worker_that_is_free_does_not_start_too_early(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def child(job: Job, *arguments: object) -> Outcome:
        events.append(f"{job.title} starts")
        time.sleep(0.2 if job.leaves else 0)
        events.append(f"{job.title} ends")
        return Outcome(job, None)

    monkeypatch.setattr(executors, "_child", child)
    three = jobs(workplace, "--recover", "lora")
    done = executors.execute(three, executor="process", workers=3, fail_fast=False, show=lambda event: None)
    assert len(done) == 3 and events.index("shortgpt ends") < events.index("shortgpt + fine-tuning starts")


def test_helpers_of_a_launch_fine_tune_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, tuned = jobs(workplace, *SHORT)
    plain = tuned.plain
    assert plain
    announced, helped = iter([plain.to_json(), tuned.to_json(), None]), []
    monkeypatch.setattr(launch, "_from_main", lambda text: next(announced))
    monkeypatch.setattr(checkpoint, "assist", lambda job: helped.append(job.title))
    monkeypatch.setattr(recovered, "assist", lambda job: helped.append(job.title))
    assert launch.help_out("cpu") == 0 and helped == ["shortgpt", "shortgpt + fine-tuning"]
    monkeypatch.undo()
    with pytest.raises(OSError):  # the main process has made it by now
        recovered.assist(tuned)
    assert small_run.run(workplace, "--checkpoints", str(workplace / "kept")) == 0
    recovered.assist(replace(tuned, checkpoints=str(workplace / "kept")))


def test_without_the_package_nothing_starts(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    assert small_run.run(workplace, *SHORT, "--plan") == 0
    assert small_run.run(workplace, *SHORT) == 2
    assert "pip install '.[finetune]'" in capsys.readouterr().err
    assert not list(workplace.rglob("record.json")) and not list(workplace.rglob("log.txt"))
    assert small_run.run(workplace) == 0


@pytest.mark.parametrize(
    "more, said",
    [
        (("--set", "lora.rank=4"), "Add --recover lora"),
        (("--recover", "lora", "--set", "lora.rank=none"), "lora.rank=none"),
        (("--recover", "lora", "--set", "shortgtp.metric=angular"), "Did you mean shortgpt"),
    ],
)
def test_settings_of_nothing(more: tuple[str, ...], said: str, workplace: Path, capsys) -> None:
    assert small_run.run(workplace, *more) == 2
    assert said in capsys.readouterr().err


def test_plain_cells_keep_their_ids() -> None:
    """Those of the committed records; and every setting of the fine-tuning makes another."""
    plain = plan.jobs(request("--ratios", "0.5"))
    both = plan.jobs(request("--ratios", "0.5", "--recover", "lora"))
    assert [job.cell.id for job in both if not job.cell.recover] == [job.cell.id for job in plain]
    recipes = [Recovery(), Recovery(rank=4), Recovery(merge=False), Recovery(learning_rate=1e-4)]
    ids = {replace(CELL, recover=recipe.record()).id for recipe in recipes}
    assert len(ids | {CELL.id}) == len(recipes) + 1


def test_records_of_before_are_read(tmp_path: Path, finished_once: Path) -> None:
    committed = Path(run_all.__file__).parent / "results"
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in committed.rglob("record.json")}
    old = [path for path, content in read.items() if "recover" not in content["cell"]]
    assert old
    for path in old:
        found = store.read_record(path)
        assert found is not None and found["cell"]["recover"] is None and found["notes"] == []
