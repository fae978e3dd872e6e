"""Fine-tuning of gates that weigh what they choose: against a loop written out, what stays, resuming, recomputing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from methods import modeling
from methods.modeling.structures.moe_gates import STEP
from methods.modeling.structures.moe_routers import AnalyticRouter, MLPRouter
from methods.recovery import Recovery, adapters, gates
from methods.training import loop
from methods.training.data import Blocks
from methods.training.loop import Loop
from tests.methods.recovery.made_of import fresh, needs_peft
from tests.methods.recovery.test_fine_tuning import recover, same, weights
from tests.methods.training.small import SmallCalibration, tokenizer

pytestmark = needs_peft
STEPS = 5


def mixture(gate: str, name: str = "llama-gqa", layers: int = 1) -> PreTrainedModel:
    """Six experts, of which tokens get two, chosen as CMoE (`scaled`) or LLaMA-MoE (`softmax`) do, by routers of one
    or two layers."""
    model, draw = fresh(name), torch.Generator().manual_seed(0)
    for layer in modeling.Decoder(model).layers:
        parts = torch.randperm(layer.mlp_output.in_features, generator=draw).chunk(6)
        hidden = layer.mlp_inputs[0].in_features
        rows = [torch.randn(6, hidden, generator=draw) for _ in layer.mlp_inputs]
        linear = MLPRouter(hidden, 6, cosine=False) if layers == 2 else rows[0]
        router = AnalyticRouter(rows, layer.mlp_activation) if gate == "scaled" else linear
        modeling.convert_mlp(layer, router, parts, active=2, gate=gate)  # type: ignore[arg-type]
    return modeling.rebuild(model, {"moe_mlp": modeling.expert_record(model)})


def moved(gate: str, name: str, tmp_path: Path) -> set[str]:
    model = mixture(gate, name)
    before, projections = weights(model), adapters.projections(model)
    recover(model, tmp_path, steps=STEPS)
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(before[key])}
    assert {f"{key}.weight" for key in projections} <= changed
    return changed - {f"{key}.weight" for key in projections}


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "phi"])
def test_what_of_a_gate_is_trained(name: str, tmp_path: Path) -> None:
    routers = moved("softmax", name, tmp_path / "softmax")
    assert len(routers) == 4 and all(key.endswith("router.weight") for key in routers)
    gated = [key.rpartition("gate.")[2] for key in sorted(moved("scaled", name, tmp_path / "scaled"))]
    assert gated == ["bias", "scale"] * 4


@pytest.mark.parametrize("gate", ["softmax", "scaled"])
def test_it_is_adamw_beside_the_adapters(gate: str, tmp_path: Path) -> None:
    """With adapters that cannot learn, so that gates are all there is."""
    model, reference = mixture(gate), mixture(gate)
    recover(model, tmp_path, steps=STEPS, learning_rate=1e-9, warmup=0.0, clip=1e6)
    for name, tensor in written_out(reference).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=2e-6)


def written_out(model: PreTrainedModel) -> dict[str, Tensor]:
    """Plain AdamW on routers or u, and b's steps counted from hooks."""
    base, blocks = weights(model), iter(Blocks(SmallCalibration().rows(), tokenizer(), 16, 0))
    names = [name for name in base if name.endswith(("router.weight", "gate.scale"))]
    trained = {name: nn.Parameter(base[name]) for name in names}
    optimizer, scaled = torch.optim.AdamW(trained.values(), weight_decay=0.0), gates._scaled(model)
    for gate in scaled:
        gate.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (STEPS - step) / STEPS
        batch = torch.stack([next(blocks), next(blocks)])
        predicted = functional_call(model, trained, kwargs={"input_ids": batch[:, :-1]}, tie_weights=False).logits
        targets = torch.where(batch[:, 1:] == 0, -100, batch[:, 1:])
        nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for gate in scaled:
            loads = gate.loads - 2 * 2 * 16 / 6  # two experts for each of 2 x 16 tokens
            gate.bias -= STEP * loads.sign()
    return {name: parameter.detach() for name, parameter in trained.items()} | {
        name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("gate.bias")
    }


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = mixture("scaled"), mixture("scaled")
    recover(whole, tmp_path / "whole", steps=STEPS)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    step = Loop.step

    def killed(self: Loop, number: int, batch: Tensor) -> dict[str, float]:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(Loop, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        recover(part, tmp_path / "part", steps=STEPS)
    monkeypatch.setattr(Loop, "step", step)
    for _ in range(2):  # the second time from the final checkpoint
        part = mixture("scaled")
        recover(part, tmp_path / "part", steps=STEPS)
        assert same(part, whole)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    made = [mixture("scaled") for _ in range(2)]
    for model, checkpointing in zip(made, (False, True), strict=True):
        recover(model, tmp_path / str(checkpointing), checkpointing=checkpointing)
    assert same(*made)


@pytest.mark.parametrize("layers", [1, 2])
def test_gates_without_weights_stay(layers: int) -> None:
    model = mixture("equal", layers=layers)
    assert not any("router" in name for name in adapters.attach(model, Recovery()))
    assert not gates.trained_gates(model) and not gates.balances(model)


def test_routers_of_two_layers_are_trained_without_adapters(tmp_path: Path) -> None:
    model = mixture("softmax", layers=2)
    before = weights(model)
    recover(model, tmp_path, steps=STEPS)
    routers = [name for name in before if ".router." in name]
    assert len(routers) == 8 and not any(model.state_dict()[name].equal(before[name]) for name in routers)
