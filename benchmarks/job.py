"""One cell of the matrix: what identifies it, where its files lie, what of it is already done. Needs no torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self

import methods
from benchmarks import models, store, tasks
from benchmarks.presets import PRESETS, Preset
from benchmarks.tasks import Task
from methods.base import Budget, Method, Prediction
from methods.errors import UserError
from methods.recovery import Recovery

LOCK_SECONDS = 60
"""How long a cell waits for the process of a run that was just killed to end."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Calibration text, as far as it identifies a cell."""

    name: str
    """A data set of `benchmarks.data`; for a file its name and a hash of its content."""
    samples: int
    """Windows drawn."""
    window: int
    """Tokens per window."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row to be measured. Every field can change the result, so every field is part of the identity."""

    model: str
    """The model's name, safe for a folder."""
    fingerprint: str
    """Which weights."""
    method: str
    """Registered name."""
    method_config: Mapping[str, Any]
    """All hyperparameters of the method."""
    ratio: float
    """Asked share of active parameters."""
    ratio_basis: Literal["total", "block"]
    """The share of what."""
    seed: int
    """Draws the calibration windows and seeds the method."""
    calibration: Source | None
    """None for the dense model, which needs none."""
    budget: Preset
    """How much evaluation."""
    dtype: str
    """In which the model is loaded and evaluated."""
    recover: Mapping[str, Any] | None = None
    """All settings of the fine-tuning that follows the compression; None: nothing follows."""

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits of a hash over the schema and all fields; tasks are not part of it.

        A cell that is not fine-tuned has the id it had before that was possible.
        """
        fields = {key: value for key, value in asdict(self).items() if (key, value) != ("recover", None)}
        content = json.dumps({"schema": store.SCHEMA, **fields}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def recorded(self) -> dict[str, Any]:
        """The `cell` entry of a record; the fingerprint stands there as `provenance.model_revision`."""
        fields = asdict(self) | {"id": self.id}
        return {key: fields[key] for key in store.CELL_KEYS}


def lock_of(record: Path) -> Path:
    """Held by the one process that works on the cell of a record, beside the models' folders."""
    return Path(*record.parts[:-5], ".locks", record.parent.name)


@cache
def _code() -> str:
    """A hash of how models are compressed: what older code has left is not to be used."""
    files = sorted(Path(methods.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell and how to run it. Travels to the cell's process as JSON."""

    cell: Cell
    """What is measured."""
    model: str
    """What `--models` said: alias, hub id or directory."""
    source: str
    """What `--calibration` said, or the model's default: a data set or a path."""
    settings: Mapping[str, str]
    """`--set` of this method, as text."""
    tasks: tuple[str, ...]
    """Tasks and suites as asked for."""
    tolerance: float | None
    """Largest accepted difference between asked and achieved ratio; None: the method's default."""
    out: str
    """Folder of the records."""
    checkpoints: str | None
    """Folder in which compressed checkpoints are kept; None: they are not."""
    device: str
    """Where torch computes."""
    force: bool
    """Measure the asked tasks again, and compress again unless only evaluation is asked for."""
    only_evaluate: bool
    """Never compress: the checkpoint must be there."""
    command: str
    """The command line, for the record."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Asked tasks that are not run, and why: their data cannot be had."""
    leaves: bool = False
    """Whether the checkpoint stays in the scratch folder, for the fine-tuned cell that follows in the same run."""

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that `to_json` wrote."""
        content = json.loads(text)
        cell = content["cell"]
        cell["budget"] = PRESETS[cell["budget"]["name"]]
        cell["calibration"] = cell["calibration"] and Source(**cell["calibration"])
        return cls(**content | {"cell": Cell(**cell), "tasks": tuple(content["tasks"])})

    @property
    def label(self) -> str:
        """The cell in a few words."""
        return f"{self.cell.model} {self.title} {self.cell.ratio:g} seed {self.cell.seed}"

    @property
    def title(self) -> str:
        """The method, and whether fine-tuning follows."""
        return self.cell.method + (" + fine-tuning" if self.cell.recover else "")

    @property
    def plain(self) -> Self | None:
        """The job whose checkpoint this one fine-tunes, as far as it is done; None where nothing is fine-tuned."""
        return replace(self, cell=replace(self.cell, recover=None), force=False) if self.cell.recover else None

    @property
    def recovery(self) -> Recovery | None:
        """The fine-tuning that follows the compression."""
        return Recovery.from_record(self.cell.recover) if self.cell.recover else None

    @property
    def folder(self) -> Path:
        """The record and what lies beside it."""
        return self._below(self.out)

    @property
    def record(self) -> Path:
        """The record itself."""
        return self.folder / "record.json"

    @property
    def scratch(self) -> Path:
        """What a killed cell resumes from; gone once the record is written."""
        return self.folder / "scratch"

    @property
    def log(self) -> Path:
        """Everything the cell prints, attempt after attempt."""
        return self.folder / "log.txt"

    @property
    def shared(self) -> Path:
        """What cells of one model, dtype, device, text and seed can use of each other's work, while the run lasts."""
        cell = asdict(self.cell)
        like = [*(cell[key] for key in ("fingerprint", "dtype", "calibration", "seed")), self.device, _code()]
        return Path(self.out, ".shared", hashlib.sha256(json.dumps(like).encode()).hexdigest()[:12])

    @property
    def lock(self) -> Path:
        """Held by the one process that works on the cell."""
        return lock_of(self.record)

    @property
    def kept(self) -> Path | None:
        """Where the checkpoint is to stay after the run: a folder of its own, as `--checkpoints` may name `--out`."""
        return self._below(self.checkpoints) / "checkpoint" if self.checkpoints else None

    @property
    def checkpoint(self) -> Path:
        """The compressed checkpoint to evaluate: the kept one if there is one, else that of the scratch folder."""
        return self.kept if self.kept and self.kept.is_dir() else self.scratch / "checkpoint"

    def _below(self, root: str) -> Path:
        return Path(root, self.cell.model, self.cell.method, f"{self.cell.ratio:g}", self.cell.id)

    @property
    def budget(self) -> Budget:
        """The asked size."""
        return Budget(ratio=self.cell.ratio, basis=self.cell.ratio_basis, tolerance=self.tolerance)

    @property
    def method(self) -> Method:
        """The configured method."""
        return methods.configure(self.cell.method, self.settings)

    def prediction(self) -> Prediction | None:
        """The size to expect; None when the model's shape is not known, or only running the method tells.

        Raises:
            UserError: the method cannot reach the ratio.
        """
        shape = models.resolve(self.model).shape
        return self.method.predict(shape, self.budget) if shape else None

    def settled(self) -> set[str]:
        """Tasks in the record that are not to be measured again."""
        record = None if self.force else store.read_record(self.record)
        return set(record["provenance"]["task_versions"]) if record else set()

    def measured(self) -> set[str]:
        """Tasks of which the record has a measurement, those asked for again with `--force` among them."""
        record = store.read_record(self.record) or store.EMPTY
        return set(record["provenance"]["task_versions"]) - set(record["skipped"])

    def asked(self) -> list[Task]:
        """Every task that was asked for."""
        return tasks.expand(self.tasks, models.resolve(self.model), self.cell.budget)

    def missing(self) -> list[Task]:
        """The asked tasks that can be run and are not in the record; with `--force` all that can be run.

        Only the names are looked at: a task of another version is in the record too, and reports tell versions apart.
        """
        left_out = self.settled() | set(self.skipped)
        return [task for task in self.asked() if task.name not in left_out]

    def skipping(self, unavailable: Mapping[str, str]) -> Self:
        """The job without those of its missing tasks whose data cannot be had.

        Args:
            unavailable: reasons by task.
        """
        reasons = {task.name: unavailable[task.name] for task in self.missing() if task.name in unavailable}
        return replace(self, skipped=reasons)

    def not_measured(self) -> dict[str, str]:
        """The asked tasks that could not be measured, or with `--force` not again, and why."""
        kept = self.measured() & set(self.skipped)
        again = {task: f"its earlier measurement stays: {self.skipped[task]}" for task in kept}
        reasons = (store.read_record(self.record) or store.EMPTY)["skipped"] | again
        return {task.name: reasons[task.name] for task in self.asked() if task.name in reasons}

    def finished(self) -> bool:
        """Whether nothing is left to do: every task is in the record, measured or skipped, and the checkpoint where it
        is to be kept."""
        record = store.read_record(self.record)
        if record is None or record["status"] == "failed" or self.force:
            return False
        kept = self.kept is None or self.kept.is_dir()
        noted = set(self.skipped) <= self.settled() | set(record["skipped"])
        return kept and noted and not self.missing()

    def lacks_checkpoint(self) -> bool:
        """Whether the checkpoint is not there and is needed: to measure a task, or because it is to be kept."""
        return bool(self.kept or self.missing()) and not self.checkpoint.is_dir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the cell's lock, so that two runs never write into one folder.

        Raises:
            UserError: another run holds it.
        """
        from filelock import FileLock, Timeout

        self.lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise UserError(
                f"Another run is working on {self.label} in {self.folder}. Let it finish and repeat the command: "
                "what it finished will be skipped. Or give another --out."
            ) from None

    def without_checkpoint(self) -> UserError:
        """The error of `--only-evaluate` where there is nothing to evaluate."""
        return UserError(
            f"--only-evaluate: there is no checkpoint of {self.label} at {self.checkpoint}. "
            "Leave --only-evaluate out to make it, or name the folder that has it with --checkpoints."
        )
