"""Checkpoints of a training run: safetensors and JSON, written whole or not at all.

One folder per checkpoint, `step-XXXXXX` while training and `final` at the end, each with everything a resumed run
needs: trained tensors, optimiser state, and `state.json` with the step, the counters and the run's identity.
Noise and data need no state of their own: both follow from the seed and the step.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.errors import UserError

TENSORS = "trained/"
"""Prefix of the tensors' names in a checkpoint, beside that of the optimiser's."""


class TrainingState:
    """What a run of training must not lose."""

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
    ) -> None:
        """`tensors` are what is to be saved, by name: all that the optimiser changes, and more."""
        self.folder, self.tensors, self.optimizer = folder, tensors, optimizer
        self.identity = json.loads(json.dumps(identity))
        self.skipped = self.in_a_row = 0
        self._saved = time.monotonic()

    def save_sometimes(self, step: int, seconds: float) -> None:
        """Save after `step` steps if the last checkpoint is that old."""
        if time.monotonic() - self._saved >= seconds:
            self.save(f"step-{step:06d}", step)

    def save(self, name: str, step: int) -> None:
        """Write one checkpoint beside the others, then remove the others."""
        for torn in self.folder.glob(".*.partial"):
            shutil.rmtree(torn)
        partial = self.folder / f".{name}.partial"
        partial.mkdir(parents=True)
        save_file(self._content(), partial / "state.safetensors")
        counters = {"step": step, "skipped": self.skipped, "in_a_row": self.in_a_row}
        (partial / "state.json").write_text(json.dumps({**counters, "identity": self.identity}, indent=1))
        shutil.rmtree(self.folder / name, ignore_errors=True)
        partial.rename(self.folder / name)
        for other in self._checkpoints():
            if other.name != name:
                shutil.rmtree(other)
        self._saved = time.monotonic()

    def resume(self) -> int:
        """Load the latest checkpoint; the number of steps it has seen, 0 where there is none.

        Raises:
            UserError: it is of another model, text or configuration.
        """
        found = self._checkpoints()
        if not found:
            return 0
        content = json.loads((found[-1] / "state.json").read_text())
        self._check(found[-1], content["identity"])
        self._load(load_file(found[-1] / "state.safetensors"))
        self.skipped, self.in_a_row = content["skipped"], content["in_a_row"]
        return content["step"]

    def _checkpoints(self) -> list[Path]:
        """Complete checkpoints, the latest last."""
        steps = sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        return [*steps, *self.folder.glob("final")]

    def _check(self, path: Path, theirs: dict[str, Any]) -> None:
        different = [key for key in self.identity if theirs.get(key) != self.identity[key]]
        if different:
            raise UserError(
                f"the training checkpoint {path} is of another {' and another '.join(different)}. Remove that folder "
                "to train anew, or repeat the command it was made with."
            )

    def _names(self) -> dict[int, str]:
        """Parameter names by their place in the optimiser's state."""
        names = {id(tensor): name for name, tensor in self.tensors.items()}
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return {place: names[id(parameter)] for place, parameter in enumerate(ordered)}

    def _content(self) -> dict[str, Tensor]:
        names = self._names()
        moments = {
            f"optimizer/{names[place]}/{key}": value
            for place, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        tensors = {f"{TENSORS}{name}": tensor for name, tensor in self.tensors.items()} | moments
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def _load(self, saved: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[f"{TENSORS}{name}"])
        content = self.optimizer.state_dict()
        content["state"] = {
            place: {key: saved[f"optimizer/{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for place, name in self._names().items()
            if f"optimizer/{name}/step" in saved
        }
        self.optimizer.load_state_dict(content)
