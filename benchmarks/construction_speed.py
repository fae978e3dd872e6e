"""Time of an MLP cut into experts as each method does it, beside the dense MLP.

    python -m benchmarks.selfcheck constructions

Experts, routers and shared parts are random; what counts is how many there are, how they are chosen and what they cost.
Each construction lets a token use half of the neurons, with the published number of experts. Modules are repeated and
take turns as in `moe_speed`, with weights read where the checkpoint has them (`shared`), and with copies per expert
(`materialised`).
"""

import copy
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks import moe_speed
from benchmarks.moe_speed import SIZES, Size, run, variant
from benchmarks.record import device
from benchmarks.selfcheck import interleaved
from methods.expert_plans import Structure
from methods.modeling.decoder import DecoderLayer
from methods.modeling.families import FAMILIES
from methods.modeling.structures.moe_convert import convert_mlp
from methods.modeling.structures.moe_mlp import MoEMLP
from methods.modeling.structures.moe_routers import AnalyticRouter, MLPRouter

CONSTRUCTIONS: dict[str, tuple[Structure, dict[str, Any]]] = {
    "moefication": (Structure(0, 24, 48), {"router": "cosine mlp"}),
    "g-moefication": (Structure(0, 32, 64), {"router": "cosine mlp", "constants": True}),
    "llama-moe": (Structure(0, 8, 16), {"router": "mlp", "gate": "softmax", "scale": 2.0}),
    "llama-moe-v2": (Structure(3, 1, 8), {"router": "linear", "gate": "softmax"}),
    "cmoe": (Structure(2, 2, 8), {"router": "analytic", "gate": "scaled"}),
}
"""Structure, and how a token's experts are chosen and weighed."""
STORES = ("shared", "materialised")
TURNS = {1: 12, 64: 4, 2048: 1}
"""By number of tokens, how often each repeat takes its turn."""


def cut(dense: LlamaMLP, size: Size, name: str, generator: torch.Generator) -> MoEMLP:
    """A copy of a dense MLP, cut as a method does it."""
    structure, options = CONSTRUCTIONS[name]
    options = dict(options)
    block = nn.Module()
    block.mlp = copy.deepcopy(dense)
    kind, routed = options.pop("router"), structure.routed

    def rows() -> torch.Tensor:
        return torch.randn(routed, size.hidden, generator=generator)

    router: Any = rows()
    if kind == "analytic":
        router = AnalyticRouter([rows(), rows()], dense.act_fn)
    elif kind != "linear":
        router = MLPRouter(size.hidden, routed, cosine=kind == "cosine mlp")
    parts = torch.randperm(size.width, generator=generator).split(structure.sizes(size.width))
    shared = torch.cat([torch.zeros(0, dtype=torch.int64), *parts[: structure.shared]])
    constants = rows() if options.pop("constants", False) else None
    layer, experts = DecoderLayer(block, FAMILIES["llama"]), parts[structure.shared :]
    active = structure.active
    return convert_mlp(layer, router, experts, shared=shared, active=active, constants=constants, **options).eval()


def modules(size: Size) -> Iterator[tuple[nn.Module, dict[str, MoEMLP]]]:
    """Dense MLPs and what the methods make of each, until there are enough to outgrow caches."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(hidden_size=size.hidden, intermediate_size=size.width, num_attention_heads=1)
    for _ in range(max(1, moe_speed.BYTES // (12 * size.hidden * size.width))):
        dense = LlamaMLP(config).eval()
        yield dense, {name: cut(dense, size, name, generator) for name in CONSTRUCTIONS}


@torch.no_grad()
def report(repeats: int, sizes: Sequence[Size] = SIZES, turns: dict[int, int] = TURNS) -> None:
    """Print a table per size."""
    print(f"{device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print("time / time of the dense MLP: medians of turns taken one after the other")
    for size in sizes:
        dense, made = zip(*modules(size), strict=True)
        tasks: dict[str, Sequence[nn.Module]] = {"dense": dense}
        for name, store in ((name, store) for name in CONSTRUCTIONS for store in STORES):
            key = f"{name} {CONSTRUCTIONS[name][0]}, {store}"
            tasks[key] = [variant(one[name], store, "fixed") for one in made]
        rows: dict[str, list[float]] = {name: [] for name in tasks}
        for tokens, times in turns.items():
            x_TD = torch.randn(tokens, size.hidden, generator=torch.Generator().manual_seed(tokens))
            found = interleaved({name: run(task, x_TD) for name, task in tasks.items()}, repeats * times)
            unit = median(found["dense"])
            for name, row in rows.items():
                row.append(unit * 1000 / len(dense) if name == "dense" else median(found[name]) / unit)
        print(f"\nhidden {size.hidden}, width {size.width}")
        print(f"{'tokens':38}" + "".join(f"{tokens:9}" for tokens in turns))
        for name, row in rows.items():
            print(f"{name + ', ms' * (name == 'dense'):38}" + "".join(f"{number:9.3f}" for number in row))
