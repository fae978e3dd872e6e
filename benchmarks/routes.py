"""Where tokens of three example texts go in a model with experts: `routes.json` beside a cell's record.

    {"probability": what it is,
     "texts": [{"name", "tokens": [string, ...],
                "layers": [{"layer", "of": N, "experts": [[best, ...], ...], "probabilities": likewise}, ...]}, ...]}

Layers are the model's blocks counted from 0, those with a dense MLP left out. A token is what it adds to the decoded
text: nothing, where it begins a character that a later one completes.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import store
from methods.modeling.structures.moe_inspect import routed
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures

# Shape suffixes: T tokens, k experts of a token, N experts.

TEXTS = Path(__file__).parent / "example_texts"
NAMES = ("encyclopaedic", "mathematical", "code")
MAX_TOKENS = 150
"""A text with more of them, as a tokenizer without merges makes, is cut."""
DIGITS = 4
PROBABILITY = f"softmax over the router's logits, rounded to {DIGITS} digits"


def write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `routes.json` into a folder; nothing where no block has experts."""
    if not any(mixtures(model)):
        return
    content = {"probability": PROBABILITY, "texts": [_text(name, model, tokenizer) for name in NAMES]}
    store.write_atomically(folder / "routes.json", json.dumps(content, allow_nan=False) + "\n")


def _text(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    encoded: Any = tokenizer((TEXTS / f"{name}.txt").read_text(encoding="utf-8"), verbose=False)
    ids = encoded["input_ids"][: min(MAX_TOKENS, model.config.max_position_embeddings)]
    layers = enumerate(routed(model, torch.tensor([ids], device=model.device), _choice))
    return {
        "name": name,
        "tokens": pieces(tokenizer, ids),
        "layers": [{"layer": n, **layer} for n, layer in layers if layer is not None],
    }


def _choice(moe: MoEMLP, logits_TN: Tensor) -> dict[str, Any]:
    experts_Tk = moe.choose(logits_TN).experts_Tk
    chosen_Tk = logits_TN.double().softmax(-1).gather(1, experts_Tk)
    probabilities = [[round(share, DIGITS) for share in row] for row in chosen_Tk.tolist()]
    return {"of": moe.layout.experts, "experts": experts_Tk.tolist(), "probabilities": probabilities}


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text decoded so far: joined they are the text, but for a character cut at the end."""
    ends = range(len(ids) + 1)
    decoded = [cast(str, tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)) for end in ends]
    whole = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in decoded]
    return [after[len(before) :] for before, after in pairwise(whole)]
