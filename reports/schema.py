"""What a record must hold; one that lacks it, or holds something else, is damaged."""

import math
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
STATUSES = ("done", "failed", "skipped")
NUMBER = (int, float)
NOTHING = type(None)
CELL = {
    "id": str,
    "model": str,
    "method": str,
    "ratio": NUMBER,
    "ratio_basis": str,
    "seed": int,
    "method_config": dict,
    "calibration": (dict, NOTHING),
    "budget": (dict, NOTHING),
    "dtype": str,
}
SIZE = dict.fromkeys(
    ("dense_params", "active_total", "active_block", "distinct_total", "stored_total", "stored_bytes"), NUMBER
) | {"on_budget": bool}
METRIC = {"value": NUMBER, "stderr": (*NUMBER, NOTHING), "n": int}
OPTIONAL = {"time": dict, "memory": dict, "notes": list, "skipped": dict}
ORIGIN: dict[str, Any] = dict.fromkeys(
    ("versions", "dataset_revisions", "task_versions", "tasks", "recovery"), (dict, NOTHING)
)
"""What may be missing from a record's `provenance`, as `OPTIONAL` from the record."""


def check(content: Mapping[str, Any]) -> bool:
    """Whether the record holds measurements, which a cell that failed early does not.

    Raises:
        ValueError: it is damaged; the message says where.
    """
    _need(content, {"status": str, "cell": dict}, "")
    if content["status"] not in STATUSES:
        raise ValueError(f"its status is {content['status']!r}, not one of {', '.join(STATUSES)}")
    _need(content["cell"], CELL, "cell.")
    _may(content["cell"], {"recover": (dict, NOTHING)}, "cell.")
    if not 0 < content["cell"]["ratio"] <= 1:
        raise ValueError(f"its cell.ratio is {content['cell']['ratio']}, not a share")
    _may(content, {"skipped": dict, "provenance": (dict, NOTHING)}, "")
    measured = content["status"] == "done" or bool(content.get("size"))
    if measured:
        _check_measured(content)
    return measured


def _check_measured(content: Mapping[str, Any]) -> None:
    _need(content, {"size": dict, "metrics": dict, "provenance": dict}, "")
    _need(content["size"], SIZE, "size.")
    _counts(content["size"])
    _may(content, OPTIONAL, "")
    _may(content["provenance"], ORIGIN, "provenance.")
    _may(content["provenance"].get("recovery") or {}, {"tokens": (int, NOTHING)}, "provenance.recovery.")
    _numbers(content, "time")
    _numbers(content, "memory")
    for name, entry in content["metrics"].items():
        _check_metric(name, entry)
    for task, run in (content["provenance"].get("tasks") or {}).items():
        if not isinstance(run, dict):
            raise ValueError(f"its provenance.tasks.{task} is {run!r}")


def _check_metric(name: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"its metrics.{name} is {entry!r}")
    _need(entry, METRIC, f"metrics.{name}.")
    if entry["n"] < 1:
        raise ValueError(f"its metrics.{name}.n is {entry['n']}")


def _need(content: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key in kinds:
        if key not in content:
            raise ValueError(f"it lacks {where}{key}")
    _may(content, kinds, where)


def _may(content: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key in kinds.keys() & content.keys():
        if not _is(content[key], kinds[key]):
            raise ValueError(f"its {where}{key} is {content[key]!r}")


def _is(value: Any, kind: Any) -> bool:
    """Whether it is of the kind; true and false are no numbers, though Python takes them for some."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _numbers(content: Mapping[str, Any], key: str) -> None:
    part = content.get(key, {})
    _may(part, dict.fromkeys(part, (*NUMBER, NOTHING)), f"{key}.")


def _counts(size: Mapping[str, Any]) -> None:
    for key in SIZE:
        if not 0 <= size[key] < math.inf or not size["dense_params"]:
            raise ValueError(f"its size.{key} is {size[key]}")
