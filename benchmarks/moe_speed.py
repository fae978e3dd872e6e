"""Time of an MLP of overlapping experts beside the dense MLP it was cut from, for every store and path.

    python -m benchmarks.selfcheck experts

Eight random experts of half the width each, one per token, against the full width; random routers, fp32. Modules are
repeated until the dense ones outgrow the processor's caches, and a turn runs them one after the other, so that weights
come from memory as they do in a model. For each number of tokens, the dense modules and those of every store and path
take turns.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.record import device
from benchmarks.selfcheck import interleaved
from methods.modeling.decoder import DecoderLayer
from methods.modeling.families import FAMILIES
from methods.modeling.structures.moe_convert import convert_mlp
from methods.modeling.structures.moe_mlp import MoEMLP
from methods.modeling.structures.moe_stores import STORES

EXPERTS = 8
BYTES = 128 << 20
"""Of dense weights that one turn runs through, more than caches hold."""


class Size(NamedTuple):
    """Hidden size, and the dense MLP's width."""

    hidden: int
    width: int


SIZES = (Size(576, 1536), Size(2048, 5632))
TURNS = {1: 12, 8: 8, 64: 4, 512: 2, 2048: 1}
"""By number of tokens, how often each repeat takes its turn."""


def pairs(size: Size) -> Iterator[tuple[nn.Module, MoEMLP]]:
    """Dense modules and mixtures of their neurons, until there are enough."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(hidden_size=size.hidden, intermediate_size=size.width, num_attention_heads=1)
    for _ in range(max(1, BYTES // (12 * size.hidden * size.width))):
        block, dense = nn.Module(), LlamaMLP(config)
        block.mlp = copy.deepcopy(dense)
        draws = [torch.randperm(size.width, generator=generator)[: size.width // 2] for _ in range(EXPERTS)]
        router = torch.randn(EXPERTS, size.hidden, generator=generator)
        moe = convert_mlp(DecoderLayer(block, FAMILIES["llama"]), router, torch.stack(draws))
        yield dense.eval(), moe.eval()


def settings() -> list[tuple[str, str]]:
    """Every store with every path that is one of its own."""
    return [
        (store, path)
        for store, kind in STORES.items()
        for path in (("fixed", "measured", *kind.paths) if len(kind.paths) > 1 else ("fixed",))
    ]


def variant(moe: MoEMLP, store: str, path: str) -> MoEMLP:
    """The same mixture with another store and path, weights in common."""
    other = copy.copy(moe)
    other.store, other.path = store, path
    return other


def run(modules: Sequence[nn.Module], x_TD: Tensor) -> Callable[[], None]:
    """One turn: every module on the same input."""

    def turn() -> None:
        for module in modules:
            module(x_TD)

    return turn


@torch.no_grad()
def ratios(size: Size, turns: Mapping[int, int]) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """Milliseconds of one dense MLP by tokens, and by store and path the time of a mixture as a multiple of that."""
    dense, mixtures = zip(*pairs(size), strict=True)
    tasks = {"dense": dense}
    tasks |= {f"{s}, {p}": [variant(moe, s, p) for moe in mixtures] for s, p in settings()}
    unit: dict[int, float] = {}
    table: dict[str, dict[int, float]] = {name: {} for name in tasks if name != "dense"}
    for tokens, repeats in turns.items():
        x_TD = torch.randn(tokens, size.hidden, generator=torch.Generator().manual_seed(tokens))
        seconds = interleaved({name: run(modules, x_TD) for name, modules in tasks.items()}, repeats)
        unit[tokens] = median(seconds["dense"]) * 1000 / len(dense)
        for name, row in table.items():
            row[tokens] = median(seconds[name]) / median(seconds["dense"])
    return unit, table


def report(repeats: int, sizes: Sequence[Size] = SIZES, turns: Mapping[int, int] = TURNS) -> None:
    """Print a table per size."""
    print(f"{device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print("time / time of the dense MLP: medians of turns taken one after the other")
    for size in sizes:
        unit, table = ratios(size, {tokens: repeats * factor for tokens, factor in turns.items()})
        dense, moe = next(pairs(size))
        stored = [sum(t.nbytes for t in module.state_dict().values()) for module in (moe, dense)]
        print(f"\nhidden {size.hidden}, width {size.width}: {EXPERTS} experts of {size.width // 2}; ", end="")
        print(f"stored bytes {stored[0] / stored[1]:.3f} of the dense MLP's")
        print(f"{'tokens':22}" + "".join(f"{tokens:9}" for tokens in turns))
        print(f"{'dense, ms':22}" + "".join(f"{unit[tokens]:9.3f}" for tokens in turns))
        for name, row in table.items():
            print(f"{name:22}" + "".join(f"{row[tokens]:9.2f}" for tokens in turns))
