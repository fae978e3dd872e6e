"""Chance in what tokens choose: experts drawn from the softmax, the same for the same seed, kept by a checkpoint."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.modeling import Decoder
from tests.methods.tiny import logits, some_ids, tiny_model


def noisy() -> PreTrainedModel:
    model = tiny_model("llama-gqa", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for layer in Decoder(model).layers:
        experts = torch.stack([torch.randperm(48, generator=generator)[:12] for _ in range(3)])
        modeling.convert_mlp(layer, 0.3 * torch.randn(3, 32, generator=generator), experts)
        modeling.convert_values(layer, modeling.ValueSelector(32, 4, 8), 3, modeling.ValueRule())
    records = {"moe_mlp": modeling.expert_record(model), "topk_values": modeling.value_record(model) or {}}
    return modeling.rebuild(model, records | {"choice_noise": {"scale": 0.5}})


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    model = noisy()
    model.save_pretrained(tmp_path)

    def seeded(model: PreTrainedModel, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return logits(model)

    assert seeded(model, 0).equal(seeded(model, 0)) and not seeded(model, 0).equal(seeded(model, 1))
    assert seeded(AutoModelForCausalLM.from_pretrained(tmp_path), 0).equal(seeded(model, 0))


def test_experts_are_drawn_from_the_softmax() -> None:
    model, ids = noisy(), some_ids(1, 1)
    router = Decoder(model).layers[0].mlp.router  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    handle = router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    draws = torch.cat([modeling.expert_ids(model, ids.expand(500, 1))[0].flatten() for _ in range(4)])
    handle.remove()
    # Values are chosen by chance too, so every copy of the token reaches the router a little differently.
    chances = torch.cat([torch.nn.functional.linear(x, router.weight).div(0.5).softmax(-1) for x in seen]).mean(0)
    shares = torch.bincount(draws, minlength=3) / len(draws)
    torch.testing.assert_close(shares, chances.flatten(), atol=0.04, rtol=0)
    assert shares.max() < 0.95
