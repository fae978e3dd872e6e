"""Whether a converted model's routers earn their place: their choice against a choice at random of the same experts.

    python run_all.py --models tiny-llama --methods tomoe --ratios 0.5 --checkpoints out/kept ...
    python -m benchmarks.routing out/kept/tiny-llama/tomoe/0.5/*/checkpoint --text wikileads

The difference is paired over windows of held-out text: both choices see the same windows.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import data, models
from benchmarks.perplexity import window_loss
from methods.errors import UserError
from methods.modeling.structures.moe_mlp import mixtures


class Comparison(NamedTuple):
    """Mean negative log-likelihoods (nats per token) of both choices, and of their paired difference its error."""

    learned: float
    random: float
    difference_stderr: float


@contextmanager
def at_random(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """While open, every token's expert is drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)

    def redraw(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        return torch.rand(logits.shape, generator=generator).to(logits)

    handles = [moe.router.register_forward_hook(redraw) for moe in mixtures(model) if moe is not None]
    if not handles:
        raise UserError("this checkpoint has no experts, so nothing routes. Name one of a method that makes experts.")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(model: PreTrainedModel, windows: Tensor, seed: int = 0) -> Comparison:
    """Losses of a model with experts on windows [W, T], routed as learned and at random; at least two windows."""
    learned = [window_loss(model, ids) for ids in windows]
    with at_random(model, seed):
        anyhow = [window_loss(model, ids) for ids in windows]
    differences = [other - own for own, other in zip(learned, anyhow, strict=True)]
    return Comparison(mean(learned), mean(anyhow), stdev(differences) / len(differences) ** 0.5)


def main() -> None:
    """Compare on every checkpoint of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--text", default="wikileads")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    for path in arguments.checkpoints:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        encoded: Any = models.load_tokenizer(path)(data.load(arguments.text, "test").content, verbose=False)
        count = min(arguments.windows, len(encoded["input_ids"]) // arguments.window)
        if count < 2:
            raise UserError(f"{arguments.text} is shorter than two windows of {arguments.window}. Use --window.")
        windows = torch.tensor(encoded["input_ids"][: count * arguments.window]).view(count, -1)
        made = compare(model, windows)
        gain = made.random - made.learned
        print(f"{path}: learned {made.learned:.4f}, random {made.random:.4f} nats per token; ", end="")
        print(f"gain {gain:.4f} +- {made.difference_stderr:.4f} over {len(windows)} windows")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"routing: {error}") from None
