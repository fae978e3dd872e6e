"""Structure: an MLP of experts, of which every token gets some.

    i(t) = argmax(R x_t), ties to the lowest index         no capacity limit, no token dropped
    y_t  = [act(x_t Wg[:, J]) * (x_t Wu[:, J])] Wd[J, :]   J = neurons of expert i(t); a plain MLP has no gate

is ToMoE's (https://arxiv.org/abs/2501.15316): one expert per token, all of one width, sets of neurons that may overlap.
In general a token gets k experts that a router (`moe_routers`) and a gate (`moe_gates`) choose and weigh, a shared part
S beside them, and constants c_j in place of the experts it does not get:

    y_t  = MLP of S (x_t) + sum over chosen j of g_j (MLP of expert j) (x_t) + sum over the others of c_j + bias

The checkpoint holds each neuron that is in use once (the family's own projections, cut to them), plus the table of who
uses what. Where every neuron of the MLP has one owner, they lie owner by owner (the shared part first), so that each
expert is a run of rows; otherwise in the order of the dense MLP. How a loaded model multiplies is a setting
(`set_experts`), which changes the result by no more than rounding.

While training, y_t of ToMoE's kind is multiplied by G[t, i(t)], whose value is 1 and whose gradient is that of
softmax(R x_t): so the router goes on learning.
"""

# Shape suffixes: B batch, T tokens, D hidden size, N experts, w neurons of the largest expert, S shared neurons,
# U neurons in use.

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.errors import UserError, unknown
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.record import add_structure, structures_of
from methods.modeling.structures import moe_choice
from methods.modeling.structures.moe_gates import Choice, make_gate
from methods.modeling.structures.moe_gates import unit_gate as unit_gate
from methods.modeling.structures.moe_layout import Layout
from methods.modeling.structures.moe_neurons import Neurons, times
from methods.modeling.structures.moe_routers import make_router
from methods.modeling.structures.moe_stores import STORES, Parts, Pseudo
from methods.modeling.structures.narrow_mlp import narrow_mlp
from methods.modeling.structures.row_products import lay_out

NAME = "moe_mlp"


class MoEMLP(nn.Module):
    """The MLP of one converted block: router, projections of the union, and the experts as positions in the union."""

    neurons: Tensor
    """Numbers that the union's neurons had in the dense MLP, int32 [U]."""
    index: Tensor
    """Each expert's neurons as positions in the union, int32 [N, w], ascending; then -1 where it has fewer than w."""
    shared: Tensor | None
    """Positions of the neurons that every token gets, int32 [S], ascending; None: there are none."""
    constants: Tensor | None
    """What stands in for each expert, [N, D]; None: nothing does."""
    store: str = "shared"
    path: str = "fixed"
    _made: tuple[list[tuple[Tensor, int]], Pseudo] | None = None
    """What the store was made of (tensors and their versions), and the store."""

    def __init__(self, layer: DecoderLayer, layout: Layout) -> None:
        """Around the projections of a layer, which have the union's size already; router and tables undefined."""
        super().__init__()
        family, weight = layer.family, layer.mlp_output.weight
        self.layout = layout
        self.input_names = [_leaf(name) for name in (family.gate, family.up) if name]
        self.output_name, self.activation_name = _leaf(family.down), _leaf(family.activation)
        for name, linear in zip(self.input_names, layer.mlp_inputs, strict=True):
            self.add_module(name, linear)
        self.add_module(self.output_name, layer.mlp_output)
        self.add_module(self.activation_name, layer.mlp_activation)
        weights = [linear.weight for linear in layer.mlp_inputs]
        self.router = make_router(layout, weights, layer.mlp_activation, self.look)
        self.gate = make_gate(layout, weight)

        def table(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=weight.device)

        self.register_buffer("neurons", table(layout.neurons))
        self.register_buffer("index", table(layout.experts, layout.width))
        self.register_buffer("shared", table(layout.shared) if layout.shared else None)
        constants = nn.Parameter(weight.new_zeros(layout.experts, len(weight))) if layout.constants else None
        self.register_parameter("constants", constants)

    @property
    def sole(self) -> bool:
        """Whether one expert, with weight 1, is all that a token gets."""
        layout = self.layout
        return layout.active == 1 and layout.gate == "equal" and not layout.shared and not layout.constants

    @property
    def sets(self) -> list[Tensor]:
        """Each expert's neurons as positions in the union, int32."""
        return [row[row >= 0] for row in self.index]

    def _linears(self) -> list[nn.Linear]:
        return [cast(nn.Linear, self._modules[name]) for name in (*self.input_names, self.output_name)]

    @property
    def union(self) -> Neurons:
        """All neurons there are; together they add the output's bias."""
        *inputs, output = self._linears()
        return Neurons(
            inputs=tuple((linear.weight, linear.bias) for linear in inputs),
            down_wD=output.weight.T,
            bias_D=output.bias,
            activation=self.get_submodule(self.activation_name),
        )

    def _parts(self) -> Parts:
        return Parts(
            union=self.union,
            index_Nw=self.index.long(),
            active=self.layout.active,
            shared=None if self.shared is None else self.shared.long(),
            constants_ND=self.constants,
            sole=self.sole,
        )

    def look(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """What all neurons say to tokens [T, D], [T, U], by calling the projections, and the experts' masks, [N, U]."""
        *inputs, _ = self._linears()
        parts = self._parts()
        return parts.union.combine([linear(x_TD) for linear in inputs]), parts.mask_NU()

    def choose(self, logits_TN: Tensor) -> Choice:
        """The experts of every token, from what its router says."""
        return self.gate(logits_TN, self.layout.active)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normed input to the MLP's output, both [..., D]."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        choice = self.choose(self.router(x_TD))
        if self.sole and choice.weights_Tk is not None:  # the weight of all there is
            y_TD = self._multiply(Choice(choice.experts_Tk, None), x_TD) * choice.weights_Tk
        else:
            y_TD = self._multiply(choice, x_TD)
        return y_TD.view(*hidden_states.shape[:-1], -1)

    def _multiply(self, choice: Choice, x_TD: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not all(isinstance(linear, nn.Linear) for linear in self._linears()):
            return self._called(choice, x_TD)  # copies would keep their gradient to themselves, or miss an adapter
        store = self._ready()
        if self.path == "fixed":
            return store.ways[moe_choice.fixed(store, x_TD)](choice, x_TD)
        if self.path == "measured":
            return store.ways[moe_choice.measured(store, choice, x_TD)](choice, x_TD)
        return store.ways[self.path](choice, x_TD)

    def _called(self, choice: Choice, x_TD: Tensor) -> Tensor:
        """As `Pseudo.masked`, by calling the projections."""
        parts, output = self._parts(), self._linears()[-1]
        hidden_TU, mask_NU = self.look(x_TD)
        return parts.finish(choice, output(times(hidden_TU, parts.factors(choice, mask_NU))))

    def _ready(self) -> Pseudo:
        """The store, made anew where a tensor behind it has been replaced or written to."""
        linears = self._linears()
        weights = (tensor for linear in linears for tensor in (linear.weight, linear.bias))
        tensors = [t for t in (self.index, self.shared, self.constants, *weights) if t is not None]
        sources = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if self._made is None or not _same(sources, self._made[0]):
            with torch.inference_mode(False), torch.no_grad():
                lay_out(linears[-1])  # each neuron of down is a row to read
                self._made = sources, STORES[self.store](self._parts())
        return self._made[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoEMLP":
        self._made = None  # moved or cast: parameters stay the same objects then
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def idle_parameters(self) -> int:
        """Parameters that one token's pass does not use.

        They are those of neurons outside its experts (of these only down's, where an oracle reads the others), and the
        constants but for their sum and those of its experts.
        """
        union, layout = self.union, self.layout
        hidden = union.down_wD.shape[1]
        inputs = sum(weight.shape[1] + (bias is not None) for weight, bias in union.inputs) * (not layout.oracular)
        constants = max(layout.experts - layout.active - 1, 0) * layout.constants
        return (layout.neurons - layout.used) * (inputs + hidden) + constants * hidden

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return ", ".join(f"{name}={value}" for name, value in self.layout.record().items())


def _same(now: list[tuple[Tensor, int]], then: list[tuple[Tensor, int]]) -> bool:
    return len(now) == len(then) and all(a is b and m == n for (a, m), (b, n) in zip(now, then, strict=True))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def install(layer: DecoderLayer, layout: Layout) -> MoEMLP:
    """Put a mixture, its values undefined, where a block's MLP is, around the same projections."""
    moe, family = MoEMLP(layer, layout).train(layer.module.training), layer.family
    if family.mlp:
        layer.module.set_submodule(family.mlp, moe)
    else:  # the block calls up, activation and down one after the other: the first of them does it all
        layer.module.set_submodule(family.up, moe)
        layer.module.set_submodule(family.activation, nn.Identity())
        layer.module.set_submodule(family.down, nn.Identity())
    return moe


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a dense model this structure's modules and shapes, in place; the values are to be loaded afterwards.

    Args:
        record: as `expert_record` writes it.
    """
    for layer, shape in zip(Decoder(model).layers, record["layers"], strict=True):
        if shape is not None:
            layout = Layout.of(shape)
            narrow_mlp(layer, torch.arange(layout.neurons))
            moe = install(layer, layout)
            moe.store, moe.path = record["store"], record["path"]


def mixtures(model: PreTrainedModel) -> list[MoEMLP | None]:
    """The mixture of every block, None where the MLP is dense."""
    return [layer.mlp if isinstance(layer.mlp, MoEMLP) else None for layer in Decoder(model).layers]


def expert_record(model: PreTrainedModel) -> dict[str, Any]:
    """The record of a model whose blocks `moe_convert` has changed."""
    found = mixtures(model)
    settings = next(({"store": moe.store, "path": moe.path} for moe in found if moe is not None), {})
    return {"layers": [None if moe is None else moe.layout.record() for moe in found], **settings}


def set_experts(model: PreTrainedModel, store: str = "shared", path: str = "fixed") -> None:
    """Say how a model's mixtures hold and multiply their weights; a checkpoint remembers it.

    Args:
        store: one of `moe_stores.STORES`; see there for what each costs. Copies are made on first use.
        path: `fixed`, `measured` (see `moe_choice`), or the way to take always: `masked`, `sorted` or `grouped`.

    Raises:
        UserError: there is no such store, or it cannot go such a way.
    """
    if store not in STORES:
        raise unknown("expert store", store, STORES)
    if path not in (paths := ("fixed", "measured", *STORES[store].paths)):
        raise UserError(f"the expert store {store!r} has no path {path!r}. Its paths: {', '.join(paths)}.")
    for moe in mixtures(model):
        if moe is not None:
            moe.store, moe.path, moe._made = store, path, None
    if (record := structures_of(model.config).get(NAME)) is not None:
        add_structure(model.config, NAME, {**record, "store": store, "path": path})
