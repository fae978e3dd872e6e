"""The masked forward pass: the dense model when everything is on, zeroed weights otherwise, gradients by autograd."""

import pytest
import torch
from torch import Tensor, nn

from methods.modeling import Decoder
from methods.tomoe.masking import MaskedDecoder, _MaskNeurons, across_heads, activations
from methods.tomoe.network import LayerMasks
from tests.methods.tiny import CONFIGS, logits, some_ids, tiny_model
from tests.methods.tomoe.small import masked

FAMILIES = ["llama-mha", "llama-gqa", "llama-mqa", "llama-biases", "qwen2", "phi", "opt"]


def everything_on(model: MaskedDecoder) -> list[LayerMasks]:
    shape, layers = model.network.shape, model.network.draw(noise=0.0)
    for masks in layers:
        masks.experts_NM = torch.ones_like(masks.experts_NM)
        masks.qk_h = None if masks.qk_h is None else torch.ones(shape.head_dim)
    for site in model.network.attention:
        site.dynamic.weight.data.zero_()  # pyright: ignore[reportAttributeAccessIssue]
    return layers


@pytest.mark.parametrize("noise", ["per_expert", "per_token"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_on_and_switched_off_are_the_dense_model_to_the_last_bit(name: str, noise: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    dense = logits(model)
    student = masked(model, mask_noise=noise)
    for site in student.network.mlp:
        site.decoder.weight.data.zero_()  # pyright: ignore[reportAttributeAccessIssue]
    with student.attached(), torch.no_grad():
        assert logits(model).equal(dense)
        student.masks = everything_on(student)
        assert logits(model).equal(dense)
    assert logits(model).equal(dense)


@pytest.mark.parametrize("vo_mask", ["v_and_o", "v_only", "o_only"])
@pytest.mark.parametrize("grad", ["single", "double"])
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_zeroed_weights(name: str, grad: str, vo_mask: str) -> None:
    """With one expert and a static value mask the masked model is the dense one with rows and columns set to zero."""
    model = tiny_model(name)
    student = masked(model, experts=1, vo_routing=False, mask_grad=grad, vo_mask=vo_mask)
    with student.attached(), torch.no_grad():
        student.masks = student.network.draw(noise=0.0)
        got = logits(model)
    assert 0 < sum(masks.qk_h.mean() for masks in student.masks) < 4  # pyright: ignore[reportOptionalMemberAccess]
    assert 0 < sum(masks.values_BTh.mean() for masks in student.masks) < 4  # pyright: ignore[reportOptionalMemberAccess]
    with torch.no_grad():
        for layer, masks in zip(Decoder(model).layers, student.masks, strict=True):
            query, key, value = layer.attention_inputs
            assert masks.qk_h is not None and masks.values_BTh is not None
            zero_rows(query, masks.qk_h)
            zero_rows(key, masks.qk_h)
            if vo_mask != "o_only":
                zero_rows(value, masks.values_BTh)
            if vo_mask != "v_only":
                layer.attention_output.weight.data = across_heads(
                    layer.attention_output.weight[None], masks.values_BTh
                )[0]
            layer.mlp_output.weight.data *= masks.experts_NM[0]
    torch.testing.assert_close(got, logits(model), rtol=1e-9, atol=1e-9)


def zero_rows(linear: nn.Linear, mask_h: Tensor) -> None:
    rows = mask_h.repeat(linear.out_features // len(mask_h))
    linear.weight.data *= rows[:, None]
    if linear.bias is not None:
        linear.bias.data *= rows


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_neuron_mask_has_the_gradient_of_the_written_out_product(gated: bool, power: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(600, 24, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(1 + gated)
    ]
    choice = torch.randint(5, (600,), generator=generator)
    routes = nn.functional.one_hot(choice, 5).double().requires_grad_()
    experts = torch.randint(2, (5, 24), generator=generator).double().requires_grad_()
    weights = torch.randn(600, 24, generator=generator, dtype=torch.float64)
    act = nn.SiLU()
    h = activations(list(parts), act)
    ours = _MaskNeurons.apply(h.detach(), routes, experts, act, power, *parts)
    written = h * (routes @ experts) ** power
    torch.testing.assert_close(ours, written)
    leaves = [*parts, routes, experts]
    expected = torch.autograd.grad((written * weights).sum(), leaves, retain_graph=True)
    for got, want in zip(torch.autograd.grad((ours * weights).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_dropped_neuron_gets_a_gradient_only_with_single_masks() -> None:
    for grad, expected in (("single", True), ("double", False)):
        model = tiny_model("llama-gqa", dtype=torch.float32)
        model.requires_grad_(False)
        student = masked(model, mask_grad=grad)
        with student.attached():
            student.masks = student.network.draw(noise=0.0)
            for masks in student.masks:
                masks.experts_NM.retain_grad()
            model(input_ids=some_ids()).logits.square().sum().backward()
        off = student.masks[1].experts_NM == 0
        assert bool((student.masks[1].experts_NM.grad[off] != 0).any()) is expected  # pyright: ignore[reportOptionalSubscript]
