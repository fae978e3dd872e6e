"""Whatever a record holds, the report is made or says what is wrong."""

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reports.formats import FORMATS
from reports.records import read_all
from reports.render import files
from tests.reports import factory

Place = tuple[str, ...]
WORDS = ["x", "", "<b>|\\&_$", "\ud800"]
NUMBERS = [True, -1, 0, 0.5, 1e308, 10**400, math.nan, math.inf, -math.inf]
ODD = [factory.GONE, None, [], {}, [1], {"a": 1}, *WORDS, *NUMBERS]


def places(content: Any, at: Place = ()) -> Iterator[Place]:
    """Where something can be changed."""
    for key, value in content.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


GOOD = factory.record(
    method="tomoe", ratio=0.6, cell__recover={"kind": "lora"}, provenance__recovery={"tokens": 307_200}
)
PLACES = list(places(GOOD))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=st.sampled_from(ODD))
@example(place=("provenance", "recovery", "tokens"), value="x")
@example(place=("size", "stored_bytes"), value=10**400)
@example(place=("metrics", "arc_easy/acc_norm@0shot", "value"), value=10**400)
@example(place=("time", "compress_s"), value=1e308)
@example(place=("cell", "model"), value="\ud800")
def test_any_value_anywhere_renders_or_is_told(
    tmp_path_factory: pytest.TempPathFactory, place: Place, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("results")
    factory.write(folder, [factory.record(), copy.deepcopy(GOOD) | {"cell": GOOD["cell"] | {"id": "1", "seed": 1}}])
    (folder / "record.json").write_text(json.dumps(factory.spoilt(GOOD, place, value)))
    found = read_all(folder)
    assert len(found) + len([p for p in found.problems if "left out" in p]) == 3
    texts = [text for text in files(found, 2.5).values() if isinstance(text, str)]
    assert b"tiny-llama" in "".join(texts).encode()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_shown_and_never_best(tmp_path: Path, value: float) -> None:
    name = "arc_easy/acc@0shot"
    records = [
        factory.record(method=method, ratio=0.6, metrics={name: {"value": share, "stderr": value, "n": 4}})
        for method, share in (("sleb", value if math.isnan(value) else -value), ("slicegpt", 0.25), ("random", 0.5))
    ]
    found = files(read_all(factory.write(tmp_path, records)))
    text = found["zero-shot.md"]
    assert str(value) in text and text.count("**") == 2 and "**50" in text
    assert "numbers that cannot be" in found["report.md"].partition("## What was run")[0]


def test_names_with_signs_of_every_format_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|_x_&$%#{}\\"
    record = factory.record(method="sleb", ratio=0.6, cell__model=name, cell__method=name, error=name)
    found = files(read_all(factory.write(tmp_path, [record, record | {"schema": 2}])))
    assert not [
        file for file, text in found.items() if re.search(r"(?<!\\)<script>alert", text) and file[-4:] != ".csv"
    ]
    assert set(FORMATS) == {
        file.partition(".")[2] for file in found if "figures/" not in file
    } and r"\textless{}script" in found["size.tex"].replace(r"\allowbreak{}", "")


def test_a_speed_of_nothing_has_no_price(tmp_path: Path) -> None:
    metrics = {"speed/decode_tokens_per_s@b1": {"value": 0.0, "stderr": None, "n": 3}}
    found = files(read_all(factory.write(tmp_path, [factory.record(metrics=metrics)])), 2.5)
    assert found["cost.csv"].splitlines()[1].endswith("1,,,")
