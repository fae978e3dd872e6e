"""What to type to have more measured: the command a record came from, with some of its options changed."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from reports.records import Record

Options = Mapping[str, Sequence[str]]
"""The words behind each option of `run_all.py`, none behind a switch."""
ONCE = ("--force", "--only-evaluate", "--fail-fast")
"""Options that were meant for one run."""
CELL = ("--models", "--methods", "--ratios", "--seeds", "--recover", "--set")
"""Options that tell the cells of a run apart."""


def command(options: Options) -> str:
    """The options as one types them; seed 0 goes without saying."""
    typed = ((name, *words) for name, words in options.items() if (name, *words) != ("--seeds", "0"))
    return f"python run_all.py {shlex.join(chain.from_iterable(typed))}"


def parsed(text: str) -> dict[str, list[str]]:
    """The options of a command; those given twice together."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in _words(text):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.setdefault(name, []).extend([value] if equals else [])
        elif name:
            found[name].append(word)
    return found


def _words(text: str) -> list[str]:
    """None where the quotes of a damaged record do not match."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def given(record: Record) -> dict[str, list[str]]:
    """The options of the command that a record came from."""
    return parsed(str(record.provenance.get("command") or ""))


def of_cell(record: Record) -> Options:
    """What runs a record's cell and no other, as it was run."""
    cell, options = record.cell, given(record)
    recover = str((cell.get("recover") or {}).get("kind", ""))
    model = _typed(cell["model"], options.get("--models", []))
    return narrowed(options, record.folder, model, cell["method"], str(cell["ratio"]), str(cell["seed"]), recover)


def _typed(model: str, words: Sequence[str]) -> str:
    """How a model was called on the command line: its records call a hub id `org--name` and a folder `name-hash`."""
    alike = (word for word in words if model in (word, word.replace("/", "--")) or model[:-7] == Path(word).name)
    return next(alike, model)


def asked(record: Record) -> Iterator[Options]:
    """What runs each of the compressed cells that the command of a record asked for."""
    options = given(record)
    models, methods, ratios = (options.get(name, []) for name in ("--models", "--methods", "--ratios"))
    seeds, recover = options.get("--seeds") or ["0"], ["", *options.get("--recover", [])]
    for model, method, ratio, seed, kind in product(models, methods, ratios, seeds, recover):
        if method not in ("all", "dense") and _is_share(ratio):
            yield narrowed(options, record.folder, model, method, ratio, seed, kind)


def _is_share(word: str) -> bool:
    """Not so of what a damaged record may hold."""
    try:
        return 0 < float(word) <= 1
    except ValueError:
        return False


def narrowed(options: Options, folder: Path, model: str, method: str, ratio: str, seed: str, recover: str) -> Options:
    """The options with one cell of theirs, whose record is to lie in `folder`."""
    settings = [word for word in options.get("--set", []) if word.partition(".")[0] in (method, recover)]
    words = ([model], [method], [ratio], [seed], recover.split(), settings)
    cell = dict(zip(CELL, words, strict=True))
    kept = {name: words for name, words in options.items() if name not in (*CELL, *ONCE)} | {"--out": [str(folder)]}
    return {name: words for name, words in cell.items() if words} | kept


def folded(each: Iterable[Options], *names: str) -> list[Options]:
    """Commands for the same cells: those that differ in nothing but one of these options made one."""
    options: list[Options] = list(each)
    for name in names:
        groups: dict[Any, list[Options]] = defaultdict(list)
        for one in options:
            groups[tuple((key, *words) for key, words in without(one, name).items())].append(one)
        options = [{**group[0], name: sorted(once(one[name] for one in group))} for group in groups.values()]
    return options


def once(each: Iterable[Sequence[str]]) -> list[str]:
    """All their words, none of them twice."""
    return list(dict.fromkeys(chain.from_iterable(each)))


def without(options: Options, *names: str) -> dict[str, Sequence[str]]:
    """The other options."""
    return {name: words for name, words in options.items() if name not in names}
