"""What a cell was run with, as pairs of texts: what tells runs apart, and how that is written."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Settings = tuple[tuple[str, str], ...]
"""Sorted `(dotted name, text)` pairs."""
NONE = "none recorded"
"""Said of a run whose record lacks every setting that tells others apart, as one from before there were such."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested settings as sorted `(dotted name, text)` pairs."""
    pairs: list[tuple[str, str]] = []
    for name, value in settings.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", str(value))]
    return tuple(sorted(pairs))


def split_settings(settings: Settings) -> tuple[Settings, Settings]:
    """Settings of the compression, and of the fine-tuning that followed (none where nothing did)."""
    after = tuple(pair for pair in settings if pair[0].startswith("recover."))
    return tuple(pair for pair in settings if pair not in after), after


def differing(runs: Iterable[Settings]) -> set[str]:
    """The names of the settings that tell `runs` apart; of a preset or text whose name suffices, the name only."""
    distinct = set(runs)
    shared = set.intersection(*(set(settings) for settings in distinct)) if distinct else set()
    names = {name for settings in distinct for name, value in settings if (name, value) not in shared}
    presets = {name.removesuffix("name") for name in names if name.endswith(".name")}
    told_apart = tuple(preset for preset in presets if _own_names(preset, distinct))
    return {name for name in names if name.endswith(".name") or not name.startswith(told_apart)}


def _own_names(preset: str, runs: Iterable[Settings]) -> bool:
    """Whether what `runs` have below `preset` goes by another name wherever it differs."""
    contents = {tuple(pair for pair in settings if pair[0].startswith(preset)) for settings in runs}
    return len(contents) == len({dict(content).get(f"{preset}name") for content in contents})


def apart(runs: Sequence[Settings]) -> list[str]:
    """For each of `runs` every setting in which they differ, whatever the others have: none is the usual one."""
    names = differing(runs)
    return [brief(settings, names) or NONE for settings in runs]


def brief(settings: Settings, names: set[str]) -> str:
    """The named settings as `field=value`."""
    kept = [(name, value) for name, value in settings if name in names]
    prefixes, suffix = r"^(method_config|recover)\.", r"\.name$"
    return ", ".join(f"{re.sub(f'{prefixes}|{suffix}', '', name)}={value}" for name, value in kept)
