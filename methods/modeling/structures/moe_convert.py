"""Making an MLP a mixture of experts: which neurons go where, and what chooses among them."""

# Shape suffixes: D hidden size, N experts, w neurons of an expert.

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from methods.modeling.decoder import DecoderLayer
from methods.modeling.structures.moe_layout import GateKind, Layout
from methods.modeling.structures.moe_mlp import MoEMLP, install
from methods.modeling.structures.moe_routers import OracleRouter
from methods.modeling.structures.narrow_mlp import narrow_mlp


def convert_mlp(
    layer: DecoderLayer,
    router: Tensor | nn.Module,
    experts: Tensor | Sequence[Tensor],
    *,
    shared: Tensor | None = None,
    active: int = 1,
    gate: GateKind = "equal",
    scale: float = 1.0,
    constants: Tensor | None = None,
) -> MoEMLP:
    """Make a block's MLP a mixture of experts, in place.

    Args:
        layer: the block, its MLP dense.
        router: R, [N, D], or one of `moe_routers`; takes the model's dtype.
        experts: the numbers of each expert's neurons in this MLP, any order, int64 [N, w] or N times [<= w].
        shared: likewise, of the neurons that every token gets beside its experts; None or empty: there are none.
        active: k, experts of a token.
        gate, scale: see `moe_gates`.
        constants: what stands in for each expert where a token does not get it, [N, D].

    Raises:
        ValueError: an expert is empty, names a neuron twice, or one that does not exist.
    """
    device, weight = layer.mlp_output.weight.device, layer.mlp_output.weight
    sets = [numbers.to(device).sort().values for numbers in experts]
    _require_sets(sets, layer.mlp_output.in_features)
    always = torch.zeros(0, dtype=torch.int64) if shared is None else shared.sort().values
    neurons, positions = _arrange([always.to(device), *sets], layer.mlp_output.in_features)
    sizes = [*map(len, sets)]
    layout = Layout(
        experts=len(sets),
        width=max(sizes),
        neurons=len(neurons),
        active=active,
        shared=len(always),
        router="linear" if isinstance(router, Tensor) else router.kind,  # pyright: ignore[reportArgumentType]
        gate=gate,
        scale=scale,
        sizes=None if min(sizes) == max(sizes) else sizes,
        constants=constants is not None,
    )
    with torch.no_grad():
        narrow_mlp(layer, neurons)
        moe = install(layer, layout)
        moe.router.load_state_dict(_values(router, neurons))
        moe.neurons.copy_(neurons)
        moe.index.copy_(pad_sequence(positions[1:], batch_first=True, padding_value=-1))
        if moe.shared is not None:
            moe.shared.copy_(positions[0])
        if moe.constants is not None and constants is not None:
            moe.constants.copy_(constants.to(weight))
    return moe


def _values(router: Tensor | nn.Module, neurons: Tensor) -> dict[str, Tensor]:
    """A router's state; what it says of each neuron of the dense MLP comes to lie as those do that are in use."""
    if isinstance(router, OracleRouter) and router.centre is not None:
        return {"centre": router.centre.to(neurons.device)[neurons]}
    return {"weight": router} if isinstance(router, Tensor) else router.state_dict()


def _require_sets(experts: Sequence[Tensor], width: int) -> None:
    for numbers in experts:
        if not len(numbers) or numbers[0] < 0 or numbers[-1] >= width or (numbers.diff() == 0).any():
            raise ValueError(
                f"experts must be rows of at least one neuron each, distinct and below {width}, not {experts}"
            )


def _arrange(parts: Sequence[Tensor], width: int) -> tuple[Tensor, list[Tensor]]:
    """The order in which the neurons of some sets are to lie, and each set's positions in it, ascending."""
    together = torch.cat([*parts])
    neurons, positions = together.unique(return_inverse=True)
    if len(neurons) == len(together) == width:  # every neuron has one owner
        neurons, positions = together, torch.arange(width, device=together.device)
    return neurons, [*positions.split([len(part) for part in parts])]
