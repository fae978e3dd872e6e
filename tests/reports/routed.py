"""Plausible `routes.json` files; no model was run for them."""

import json
from pathlib import Path
from typing import Any

TOKENS = ["The", " El", "be", " <b>", "", "模", "\n", "    ", "x\x1b[31m"]


def routes(experts: int = 4, active: int = 1, layers: tuple[int, ...] = (0, 2, 5)) -> dict[str, Any]:
    """Two texts; token t of layer n goes to expert (t + n) mod N first."""
    return {
        "probability": "softmax over the router's logits, rounded to 4 digits",
        "texts": [
            {"name": name, "tokens": TOKENS, "layers": [_layer(number, experts, active) for number in layers]}
            for name in ("encyclopaedic", "code")
        ],
    }


def _layer(number: int, experts: int, active: int) -> dict[str, Any]:
    chosen = [[(t + number + k) % experts for k in range(active)] for t in range(len(TOKENS))]
    return {
        "layer": number,
        "of": experts,
        "experts": chosen,
        "probabilities": [[round(0.9 / (1 + t + k), 4) for k in range(active)] for t in range(len(TOKENS))],
    }


def write(record: Path, content: dict[str, Any]) -> None:
    """Beside a record."""
    record.with_name("routes.json").write_text(json.dumps(content), encoding="utf-8")
