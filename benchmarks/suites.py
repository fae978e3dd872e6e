"""The suites of `--tasks`, and what is known of their tasks before anything is fetched."""

from collections.abc import Mapping
from dataclasses import dataclass

ZEROSHOT = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
FEWSHOT = ("boolq@32shot", "sciq", "piqa", "winogrande@5shot", "arc_challenge@25shot", "hellaswag@10shot")
SUITES: Mapping[str, tuple[str, ...]] = {
    "ppl": (),  # the model's own two texts
    "zeroshot": ZEROSHOT,
    "fewshot": FEWSHOT,
    "moe-v2": ("fewshot", "truthfulqa_mc2", "mmlu"),
    "mmlu": ("mmlu@5shot",),
    "speed": ("speed",),
    "all": ("ppl", "zeroshot", "moe-v2", "speed"),
}
"""Single tasks and other suites. `fewshot` is the set of the LLaMA-MoE papers, `moe-v2` that of the second one."""
WITHOUT_HUB: Mapping[str, tuple[str, ...]] = {
    "zeroshot": ("wikileads_mc",),
    "fewshot": ("wikileads_mc@5shot",),
    "moe-v2": ("fewshot",),
    "all": ("ppl", "zeroshot", "fewshot", "speed"),
}
"""What suites mean for embedded and asset models, which run with no hub in reach. MMLU has no equivalent: asked for, it
is the stock one, skipped where its data cannot be had."""


@dataclass(frozen=True)
class Extent:
    """How much there is of a task."""

    documents: int
    """In its test split."""
    question: int
    """Tokens of a question, and about those of a solved example."""
    answers: int
    """Tokens of all its choices together."""


EXTENTS: Mapping[str, Extent] = {
    "arc_challenge": Extent(1172, 30, 24),
    "arc_easy": Extent(2376, 28, 17),
    "boolq": Extent(3270, 155, 2),
    "hellaswag": Extent(10042, 30, 55),
    "mmlu": Extent(14042, 111, 4),
    "piqa": Extent(1838, 14, 46),
    "sciq": Extent(1000, 115, 6),
    "truthfulqa_mc2": Extent(817, 188, 78),
    "wikileads_mc": Extent(489, 105, 33),
    "winogrande": Extent(1267, 17, 28),
}
"""Documents of the official splits; tokens by SmolLM2's tokenizer, but those of SciQ, which are a guess."""
UNKNOWN = Extent(3000, 100, 40)
"""What to reckon with for any other task."""
MEMBERS: Mapping[str, int] = {"mmlu": 57}
"""Tasks of a group; a limit of documents holds for each of them."""


def extent(name: str, limit: int | None) -> Extent:
    """How much of a task is run where each has at most `limit` documents (None: all)."""
    whole = EXTENTS.get(name, UNKNOWN)
    most = whole.documents if limit is None else limit * MEMBERS.get(name, 1)
    return Extent(min(whole.documents, most), whole.question, whole.answers)
