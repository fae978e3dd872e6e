"""The masked forward pass (pseudo-MoE): the dense model with masks multiplied in, no weight changed (ToMoE, eq. 1-4).

    MLP         y = [act(x Wg) * (x Wu) * s_t] Wdown                          s_t the mask of the token's expert
    attention   q * s_0, k * s_0,  v_j * s_j (key token),  o_t * s_t (query token, before Wo)

Masks come in through hooks on the projections, so that every family's own forward pass runs. Query and key share s_0,
so one factor is enough for the value of their product: `mask_grad=single` masks k alone (it has fewer heads) and gives
dropped dimensions a gradient; `double` masks both, as published, and a dropped dimension comes back only by noise. The
same holds for act(gate) and up.

Little is kept for the backward pass: of what has the MLP's width only the outputs of gate and up, and of a token's
choice of values nothing: it is made again, with the same noise, from what the norm before attention reads. With noise
per expert the peak of a step (gradients of what is trained included, 1,024 tokens) is above that of a plain step by at
most 15 % of the dense model's activations: 14 % for a hidden size of 192 and an MLP of 240 in fp32, 10 % with 264, 2 to
9 % for Llamas of usual proportions, and it is below the plain step for Phi. bf16 needs less. With noise per token a
bf16 Llama needs about 80 % more.
"""

# Shape suffixes: B batch, T tokens, D hidden size, N experts, M MLP width, H heads, h head dimension.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from methods.modeling.decoder import Decoder, DecoderLayer
from methods.tomoe.network import LayerMasks, ToMoENetwork
from methods.training.precision import full_precision
from methods.training.straight_through import st_gumbel_sigmoid, st_gumbel_softmax

CHUNK = 256
"""Tokens whose MLP activations are held in fp32 at a time, in the backward pass."""


class _MaskNeurons(torch.autograd.Function):
    """h * (G S) with h = activations(inputs): the mask of each token's expert on the MLP's activations.

    Only the outputs of gate and up are kept, of all that has the MLP's width: the backward pass makes h again, a few
    tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TM: Tensor,
        routes_TN: Tensor,
        experts_NM: Tensor,
        activation: nn.Module,
        power: int,
        *inputs_TM: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(routes_TN, experts_NM, *inputs_TM)
        ctx.activation, ctx.power = activation, power
        return h_TM * embedding(routes_TN.argmax(-1), experts_NM.to(h_TM.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: activation checkpointing gives them out a single time
        routes_TN, experts_NM, *inputs_TM = saved
        grad_routes_TN, grad_experts_NM, *grads_TM = map(torch.zeros_like, saved)
        for start in range(0, len(grad_TM), CHUNK):
            tokens = slice(start, start + CHUNK)
            grad, routes, inputs = grad_TM[tokens], routes_TN[tokens], [tensor[tokens] for tensor in inputs_TM]
            mask = embedding(routes.argmax(-1), experts_NM.to(grad.dtype))
            h, pulled = _value_and_gradients(inputs, ctx.activation, grad * mask)
            product = full_precision(grad * h)
            if ctx.power == 2:
                product = 2 * product * mask
            grad_experts_NM += routes.T @ product
            grad_routes_TN[tokens] = product @ experts_NM.T
            for whole, part in zip(grads_TM, pulled, strict=True):
                whole[tokens] = part
        return None, grad_routes_TN, grad_experts_NM, None, None, *grads_TM


def _value_and_gradients(
    inputs: list[Tensor], activation: nn.Module, grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """activations(inputs), and the gradients of its inputs for that of its output."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        h = activations(inputs, activation)
    return h.detach(), torch.autograd.grad(h, inputs, grad)


def activations(inputs: list[Tensor], activation: nn.Module) -> Tensor:
    """act(gate) * up, or act(up) of a plain MLP."""
    first, *rest = inputs
    return activation(first) * rest[0] if rest else activation(first)


class MaskedDecoder:
    """A dense model whose layers apply `self.masks` while they are on.

    With no masks (None) the model is the dense one: the teacher.
    """

    def __init__(self, decoder: Decoder, network: ToMoENetwork, *, noise: float = 1.0) -> None:
        self.decoder, self.network, self.noise = decoder, network, noise
        self.masks: list[LayerMasks] | None = None

    @contextmanager
    def attached(self) -> Iterator["MaskedDecoder"]:
        """While open, the hooks are in the model."""
        handles = [
            handle for index, layer in enumerate(self.decoder.layers) for handle in self._attach_layer(index, layer)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.decoder.layers:
                del layer.attention_norm.forward

    def _attach_layer(self, index: int, layer: DecoderLayer) -> list[Any]:
        query, key, value = layer.attention_inputs
        layer.attention_norm.forward = self._choosing(index, layer.attention_norm.forward)
        return [
            query.register_forward_hook(self._hook(index, self._mask_query)),
            key.register_forward_hook(self._hook(index, self._mask_key)),
            value.register_forward_hook(self._hook(index, self._mask_value)),
            layer.attention_output.register_forward_pre_hook(self._hook(index, self._mask_output)),
            layer.mlp_inputs[0].register_forward_pre_hook(self._hook(index, self._route)),
            *self._attach_mlp(index, layer),
        ]

    def _attach_mlp(self, index: int, layer: DecoderLayer) -> list[Any]:
        inputs: dict[int, Tensor] = {}
        activation = layer.module.get_submodule(layer.family.activation)

        def keep(position: int) -> Callable[..., None]:
            return lambda masks, index, args, output: inputs.__setitem__(position, output)

        def mask(masks: LayerMasks, index: int, args: tuple, output: None = None) -> tuple:
            return (self._mask_neurons(masks, index, args[0], [inputs.pop(i) for i in sorted(inputs)], activation),)

        kept = enumerate(layer.mlp_inputs)
        handles = [linear.register_forward_hook(self._hook(index, keep(position))) for position, linear in kept]
        return [*handles, layer.mlp_output.register_forward_pre_hook(self._hook(index, mask))]

    def _hook(self, index: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any = None) -> Any:
            if self.masks is None:
                return None
            with torch.autocast(args[0].device.type, enabled=False):
                return function(self.masks[index], index, args, output)

        return hook

    def _choosing(self, index: int, norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The norm before attention that has its tokens choose values too, and keeps neither for the backward pass."""

        def choose(x_BTD: Tensor, mean_E: Tensor) -> tuple[Tensor, Tensor]:
            x_BTD = norm(x_BTD)
            return x_BTD, self._choose_values(index, x_BTD, mean_E)

        def chosen(x_BTD: Tensor) -> Tensor:
            if self.masks is None or not self.network.settings.dynamic_values:
                return norm(x_BTD)
            masks = self.masks[index]
            with torch.autocast(x_BTD.device.type, enabled=False):
                made: Any = checkpoint(choose, x_BTD, masks.mean_E, use_reentrant=False)
            x_BTD, masks.values_BTh = made
            return x_BTD

        return chosen

    def _choose_values(self, index: int, x_BTD: Tensor, mean_E: Tensor) -> Tensor:
        logits_BTh = self.network.attention_sites[index].value_logits(x_BTD, mean_E)
        return st_gumbel_sigmoid(logits_BTh, self.network.settings.tau, noise=self.noise)

    def _route(self, masks: LayerMasks, index: int, args: tuple, output: None) -> None:
        logits_BTN = self.network.mlp_sites[index].router(args[0])
        masks.routes_BTN, masks.shares_BTN = st_gumbel_softmax(logits_BTN, self.network.settings.tau, noise=self.noise)

    def _mask_neurons(
        self, masks: LayerMasks, index: int, h: Tensor, inputs: list[Tensor], activation: nn.Module
    ) -> Tensor:
        settings, routes = self.network.settings, masks.routes_BTN
        assert routes is not None
        power = 2 if settings.mask_grad == "double" and len(inputs) == 2 else 1
        if settings.mask_noise == "per_token":
            logits = self.network.mlp_sites[index].token_logits(routes, masks.embeddings_NE)
            mask = st_gumbel_sigmoid(logits, settings.tau, noise=self.noise).view_as(h).to(h.dtype)
            return h * mask * mask if power == 2 else h * mask
        h_TM, routes_TN, *inputs_TM = (tensor.flatten(0, -2) for tensor in (h.detach(), routes, *inputs))
        flat = _MaskNeurons.apply(h_TM, routes_TN, masks.experts_NM, activation, power, *inputs_TM)
        return flat.view_as(h)  # pyright: ignore[reportOptionalMemberAccess]

    def _mask_key(self, masks: LayerMasks, index: int, args: tuple, output: Tensor) -> Tensor:
        return output if masks.qk_h is None else across_heads(output, masks.qk_h)

    def _mask_query(self, masks: LayerMasks, index: int, args: tuple, output: Tensor) -> Tensor:
        return self._mask_key(masks, index, args, output) if self.network.settings.mask_grad == "double" else output

    def _mask_value(self, masks: LayerMasks, index: int, args: tuple, output: Tensor) -> Tensor:
        if masks.heads_H is not None:
            return whole_heads(output, masks.heads_H)
        assert masks.values_BTh is not None
        return output if self.network.settings.vo_mask == "o_only" else across_heads(output, masks.values_BTh)

    def _mask_output(self, masks: LayerMasks, index: int, args: tuple, output: None) -> tuple[Tensor]:
        if masks.heads_H is not None:
            return (whole_heads(args[0], masks.heads_H),)
        assert masks.values_BTh is not None
        return (args[0] if self.network.settings.vo_mask == "v_only" else across_heads(args[0], masks.values_BTh),)


def across_heads(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T, H h] times a mask over the head dimension, [h] or [B, T, h], the same for all heads."""
    heads = x.unflatten(-1, (-1, mask.shape[-1]))
    return (heads * mask.to(x.dtype).unsqueeze(-2)).flatten(-2)


def whole_heads(x: Tensor, mask_H: Tensor) -> Tensor:
    """x [B, T, (multiple of H) h] times one bit per key/value head; query heads follow their key/value head."""
    heads = x.unflatten(-1, (len(mask_H), -1))
    return (heads * mask_H.to(x.dtype)[:, None]).flatten(-2)
