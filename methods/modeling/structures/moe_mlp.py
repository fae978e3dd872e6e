"""Structure: an MLP of overlapping experts, one per token (ToMoE, https://arxiv.org/abs/2501.15316).

    i(t) = argmax(R x_t), ties to the lowest index         no capacity limit, no token dropped
    y_t  = [act(x_t Wg[:, J]) * (x_t Wu[:, J])] Wd[J, :]   J = neurons of expert i(t); a plain MLP has no gate

Every expert is a set of neurons of the dense MLP, all of one width w, and sets may overlap. The checkpoint holds each
neuron of their union once (the family's own projections, cut to it), plus the table of who uses what. How a loaded
model multiplies is a setting (`set_experts`), which changes the result by no more than rounding.

While training, y_t is multiplied by G[t, i(t)], whose value is 1 and whose gradient is that of softmax(R x_t): so the
router goes on learning.
"""

# Shape suffixes: B batch, T tokens, D hidden size, N experts, w neurons of an expert, U neurons of all experts.

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from methods.errors import UserError, unknown
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.record import add_structure, structures_of
from methods.modeling.structures import moe_choice
from methods.modeling.structures.moe_neurons import Neurons, times
from methods.modeling.structures.moe_stores import STORES, Pseudo
from methods.modeling.structures.narrow_mlp import narrow_mlp
from methods.modeling.structures.row_products import lay_out

NAME = "moe_mlp"


class MoEMLP(nn.Module):
    """The MLP of one converted block: router, projections of the union, and the experts as positions in the union."""

    neurons: Tensor
    """Numbers that the union's neurons had in the dense MLP, int32 [U], ascending."""
    index: Tensor
    """Each expert's neurons as positions in the union, int32 [N, w], ascending."""
    store: str = "shared"
    path: str = "fixed"
    _made: tuple[list[tuple[Tensor, int]], Pseudo] | None = None
    """What the store was made of (tensors and their versions), and the store."""

    def __init__(self, layer: DecoderLayer, experts: int, width: int) -> None:
        """Around the projections of a layer, which have the union's size already; router and tables undefined."""
        super().__init__()
        family, weight, union = layer.family, layer.mlp_output.weight, layer.mlp_output.in_features
        self.input_names = [_leaf(name) for name in (family.gate, family.up) if name]
        self.output_name, self.activation_name = _leaf(family.down), _leaf(family.activation)
        for name, linear in zip(self.input_names, layer.mlp_inputs, strict=True):
            self.add_module(name, linear)
        self.add_module(self.output_name, layer.mlp_output)
        self.add_module(self.activation_name, layer.mlp_activation)
        hidden = layer.mlp_inputs[0].in_features
        self.router = nn.Linear(hidden, experts, bias=False, device=weight.device, dtype=weight.dtype)
        self.register_buffer("neurons", torch.zeros(union, dtype=torch.int32, device=weight.device))
        self.register_buffer("index", torch.zeros(experts, width, dtype=torch.int32, device=weight.device))

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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normed input to the MLP's output, both [..., D]."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TN = self.router(x_TD)
        experts_T = logits_TN.argmax(-1)
        y_TD = self._multiply(experts_T, x_TD)
        if self.training:
            y_TD = y_TD * unit_gate(logits_TN, experts_T)
        return y_TD.view(*hidden_states.shape[:-1], -1)

    def _multiply(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not all(isinstance(linear, nn.Linear) for linear in self._linears()):
            return self._called(experts_T, x_TD)  # copies would keep their gradient to themselves, or miss an adapter
        store = self._ready()
        if self.path == "fixed":
            return store.ways[moe_choice.fixed(store, x_TD)](experts_T, x_TD)
        if self.path == "measured":
            return store.ways[moe_choice.measured(store, experts_T, x_TD)](experts_T, x_TD)
        return store.ways[self.path](experts_T, x_TD)

    def _called(self, experts_T: Tensor, x_TD: Tensor) -> Tensor:
        """As `Pseudo.masked`, by calling the projections."""
        *inputs, output = self._linears()
        pseudo = Pseudo(self.union, self.index)
        hidden_TU = pseudo.union.combine([linear(x_TD) for linear in inputs])
        return output(times(hidden_TU, embedding(experts_T, pseudo.mask_NU)))

    def _ready(self) -> Pseudo:
        """The store, made anew where a tensor behind it has been replaced or written to."""
        linears = self._linears()
        tensors = [self.index, *(t for linear in linears for t in (linear.weight, linear.bias) if t is not None)]
        sources = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if self._made is None or not _same(sources, self._made[0]):
            with torch.inference_mode(False), torch.no_grad():
                lay_out(linears[-1])  # each neuron of down is a row to read
                self._made = sources, STORES[self.store](self.union, self.index)
        return self._made[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoEMLP":
        self._made = None  # moved or cast: parameters stay the same objects then
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def idle_parameters(self) -> int:
        """Parameters that one token's pass does not use: those of the neurons outside its expert."""
        union = self.union
        inputs = sum(weight.shape[1] + (bias is not None) for weight, bias in union.inputs)
        return (len(self.neurons) - self.index.shape[1]) * (inputs + union.down_wD.shape[1])

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        experts, width = self.index.shape
        return f"experts={experts}, width={width}, neurons={len(self.neurons)}"


def unit_gate(logits_TN: Tensor, experts_T: Tensor) -> Tensor:
    """G [T, 1]: exactly 1, with the gradient of the chosen expert's probability."""
    chosen = logits_TN.softmax(-1).gather(1, experts_T[:, None])
    return 1 + (chosen - chosen.detach())


def _same(now: list[tuple[Tensor, int]], then: list[tuple[Tensor, int]]) -> bool:
    return len(now) == len(then) and all(a is b and m == n for (a, m), (b, n) in zip(now, then, strict=True))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def convert_mlp(layer: DecoderLayer, router: Tensor, experts: Tensor) -> MoEMLP:
    """Make a block's MLP a mixture of experts, in place.

    Args:
        layer: the block, its MLP dense.
        router: R, [N, D]; takes the model's dtype.
        experts: the numbers of each expert's neurons in this MLP, any order, int64 [N, w].

    Raises:
        ValueError: an expert is empty, names a neuron twice, or one that does not exist.
    """
    width = layer.mlp_output.in_features
    experts = experts.to(layer.mlp_output.weight.device).sort(1).values
    if not experts.numel() or experts[:, 0].min() < 0 or experts[:, -1].max() >= width or (experts.diff() == 0).any():
        raise ValueError(f"experts must be rows of at least one neuron each, distinct and below {width}, not {experts}")
    neurons, index = experts.unique(return_inverse=True)
    with torch.no_grad():
        narrow_mlp(layer, neurons)
        moe = _install(layer, *experts.shape)
        moe.router.weight.copy_(router)
        moe.neurons.copy_(neurons)
        moe.index.copy_(index)
    return moe


def _install(layer: DecoderLayer, experts: int, width: int) -> MoEMLP:
    """Put a mixture where a block's MLP is, around the same projections."""
    moe, family = MoEMLP(layer, experts, width), layer.family
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
            narrow_mlp(layer, torch.arange(shape["neurons"]))
            moe = _install(layer, shape["experts"], shape["width"])
            moe.store, moe.path = record["store"], record["path"]


def mixtures(model: PreTrainedModel) -> list[MoEMLP | None]:
    """The mixture of every block, None where the MLP is dense."""
    return [layer.mlp if isinstance(layer.mlp, MoEMLP) else None for layer in Decoder(model).layers]


def expert_record(model: PreTrainedModel) -> dict[str, Any]:
    """The record of a model whose blocks `convert_mlp` has changed."""

    def shape(moe: MoEMLP) -> dict[str, int]:
        experts, width = moe.index.shape
        return {"experts": experts, "width": width, "neurons": len(moe.neurons)}

    layers, settings = [], {}
    for moe in mixtures(model):
        layers.append(None if moe is None else shape(moe))
        settings = settings if moe is None else {"store": moe.store, "path": moe.path}
    return {"layers": layers, **settings}


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
