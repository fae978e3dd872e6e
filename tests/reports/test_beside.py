"""Whatever the files beside a record hold, the report is made of those that are whole and names the others."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import html
from matplotlib.backends.backend_agg import FigureCanvasAgg

from reports.beside import Beside, read
from reports.figures import figures
from reports.figures.style import styled
from reports.modules import modules_table
from reports.records import read_all
from reports.render import files
from reports.results import pool
from tests.reports import factory, routed

Place = tuple[str | int, ...]
STRUCTURE = factory.structure(mixture=factory.mixture())
GOOD = {
    "structure.json": json.dumps(STRUCTURE),
    "routes.json": json.dumps(routed.routes()),
    "training.csv": factory.training(5),
}
SHORT = "0,1,2,3,4\n"
HEAD = "step,kd,r_p,r_u,r_l\n"
LAYER: Place = ("layers", 1)
MIXTURE: Place = (*LAYER, "mixture")
LOADS: Place = ("loads", "calibration", 1)
TEXT: Place = ("texts", 0, "layers", 0)
GONE = factory.GONE
OF_STRUCTURE = ("widths", "unions", "expert-widths", "similarity", "loads")
DRAWN = {"structure.json": OF_STRUCTURE, "training.csv": ("training",), "routes.json": ()}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
) | st.sampled_from([10**400, 10**9, -1, 0, 1, 2])


def spoilt(content: Any, place: Place, value: Any) -> str:
    """The content as a file, with something else in one place, or nothing."""
    return json.dumps(factory.spoilt(content, place, value))


def places(content: Any, at: Place = ()) -> Iterator[Place]:
    """Where something can be changed."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*at, key)
        yield from places(content[key], (*at, key))


def beside(folder: Path, **damage: str) -> Path:
    """Where a record would be that has good files beside it, but for some: `structure`, `routes`, `training`."""
    for name, content in GOOD.items():
        (folder / name).write_text(damage.get(name.partition(".")[0], content), encoding="utf-8")
    return folder / "record.json"


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    found = read(beside(tmp_path))
    assert found.structure and found.training and found.routes and found.problems == ()
    assert read(tmp_path / "nothing" / "record.json") == Beside()


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("layers",), GONE, "its content lacks layers"),
        (("layers",), [], r"its layers is \[\]"),
        ((*LAYER, "layer"), "zero", r"its layers\[1\]\.layer is 'zero'"),
        ((*LAYER, "layer"), 10**9, r"its layers\[1\]\.layer is 1000000000"),
        ((*LAYER, "layer"), True, r"its layers\[1\]\.layer is True"),
        ((*LAYER, "mlp", "full"), 0, r"its layers\[1\]\.mlp\.full is 0"),
        ((*LAYER, "mlp", "full"), math.inf, r"its layers\[1\]\.mlp\.full is inf"),
        ((*LAYER, "qk", "kept"), None, r"its layers\[1\]\.qk\.kept is None"),
        ((*LAYER, "qk", "kept"), math.nan, r"its layers\[1\]\.qk\.kept is nan"),
        ((*LAYER, "qk", "kept"), 33, r"its layers\[1\]\.qk\.kept is 33"),
        (MIXTURE, "x", r"its layers\[1\]\.mixture is 'x'"),
        ((*MIXTURE, "union_share"), "1", r"union_share is '1'"),
        ((*MIXTURE, "raw_widths"), 5, r"raw_widths is 5"),
        ((*MIXTURE, "raw_widths"), ["a", "b"], r"raw_widths\[0\] is 'a'"),
        ((*MIXTURE, "raw_widths", 0), None, r"raw_widths\[0\] is None"),
        ((*MIXTURE, "raw_widths"), [1.0], r"raw_widths has 1 entries where 2 belong"),
        ((*MIXTURE, "cosine", 0), None, r"cosine\[0\] is None"),
        ((*MIXTURE, "cosine", 0, 1), "x", r"cosine\[0\]\[1\] is 'x'"),
        ((*MIXTURE, "cosine", 0), [1.0], r"cosine\[0\] has 1 entries where 2 belong"),
        ((*MIXTURE, "cosine"), [[1.0, 0.5]], r"cosine has 1 entries where 2 belong"),
        (LOADS, [0, 0], r"its loads\.calibration\[1\] sums to 0, and every token meets an expert"),
        (LOADS, [math.nan] * 2, r"its loads\.calibration\[1\]\[0\] is nan"),
        (LOADS, [1.0], r"its loads\.calibration\[1\] has 1 entries where 2 belong"),
        (LOADS, "abc", r"its loads\.calibration\[1\] is 'abc'"),
        (LOADS, None, r"its loads\.calibration\[1\] is None"),
        (LOADS, GONE, r"its loads\.calibration has 1 entries where 2 belong"),
    ],
)
def test_damaged_structures_say_where(tmp_path: Path, place: Place, value: Any, told: str) -> None:
    found = read(beside(tmp_path, structure=spoilt(STRUCTURE, place, value)))
    assert found.structure is None and found.training and found.routes
    with pytest.raises(ValueError, match=rf"^structure\.json is damaged and left out: .*{told}\. .*--force"):
        raise ValueError(*found.problems)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("texts",), GONE, "its content lacks texts"),
        (("texts",), [], "its texts have different layers, or none"),
        ((*TEXT[:2], "layers"), [], "its texts have different layers, or none"),
        (TEXT, GONE, "its texts have different layers, or none"),
        ((*TEXT, "layer"), 1, "its texts have different layers, or none"),
        (("texts",), [{"name": "code", "tokens": [], "layers": []}], "its texts have different layers, or none"),
        ((*TEXT[:2], "tokens", 0), GONE, "experts has 9 entries where 8 belong"),
        ((*TEXT[:2], "tokens", 0), 5, r"its texts\[0\]\.tokens\[0\] is 5"),
        ((*TEXT, "experts", 0), [4], r"experts\[0\]\[0\] is 4"),
        ((*TEXT, "experts", 0), [True], r"experts\[0\]\[0\] is True"),
        ((*TEXT, "probabilities", 0), [math.nan], r"probabilities\[0\]\[0\] is nan"),
        ((*TEXT, "probabilities", 0), [0.1, 0.2], r"probabilities\[0\] has 2 entries where 1 belong"),
        ((*TEXT, "experts", 0), [], r"experts\[0\] is \[\]"),
        ((*TEXT, "of"), math.inf, r"of is inf"),
        ((*TEXT, "of"), 10**9, r"of is 1000000000"),
    ],
)
def test_damaged_routes_say_where(tmp_path: Path, place: Place, value: Any, told: str) -> None:
    found = read(beside(tmp_path, routes=spoilt(routed.routes(), place, value)))
    assert found.routes is None and found.structure and found.training
    with pytest.raises(ValueError, match=rf"^routes\.json is damaged and left out: .*{told}\. .*--force"):
        raise ValueError(*found.problems)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[" * 100_000, "\0"])
def test_files_that_are_none_are_damaged(tmp_path: Path, text: str) -> None:
    found = read(beside(tmp_path, structure=text, routes=text))
    assert found.training and not found.structure and not found.routes and len(found.problems) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is empty"),
        (HEAD, "it has no step"),
        (f"{HEAD}{'1' * 200_000},1,1,1,1\n", "field larger than field limit"),
        (f"{HEAD}0,much,1,1,1\n", "its line 2: could not convert string to float: 'much'"),
        (f"{HEAD}{SHORT}1,2\n", "its line 3 has 2 values where 5 belong"),
        (f"{HEAD}{SHORT}1,2,3,4,5,6\n", "its line 3 has 6 values where 5 belong"),
        (f"{HEAD}nan,1,2,3,4\n", "its line 2 has the step nan"),
    ],
)
def test_damaged_training_says_why(tmp_path: Path, text: str, told: str) -> None:
    found = read(beside(tmp_path, training=text))
    (problem,) = found.problems
    assert problem.startswith("training.csv is damaged") and told in problem and found.training is None


def test_training_of_other_methods_is_no_damage_and_what_diverged_has_gaps(tmp_path: Path) -> None:
    assert read(beside(tmp_path, training="step,loss\n0,1\n")) == read(beside(tmp_path, training="step,loss\n0,x\n"))
    curves = read(beside(tmp_path, training=f"{HEAD}7,nan,inf,1e300,4\n")).training
    assert str(curves) == "[{'step': 7.0, 'kd': nan, 'r_p': nan, 'r_u': nan, 'r_l': 4.0}]"


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    record = beside(tmp_path)
    for name in GOOD:
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    assert len(read(record).problems) == 3


def runs(folder: Path, *cells: tuple[float, int]) -> list[Path]:
    """The folders of ToMoE's cells, a ratio and a seed each, with good files."""
    factory.write(folder, [factory.record(method="tomoe", ratio=ratio, seed=seed) for ratio, seed in cells])
    found = {}
    for path in folder.rglob("record.json"):
        beside(path.parent)
        cell = json.loads(path.read_text())["cell"]
        found[cell["ratio"], cell["seed"]] = path.parent
    return [found[cell] for cell in cells]


def test_damage_stands_at_the_top_and_the_other_ratios_are_shown(tmp_path: Path) -> None:
    first, second = runs(tmp_path, (0.8, 0), (0.6, 0))
    (first / "structure.json").write_text("{")
    (second / "routes.json").write_text("{")
    (second / "training.csv").write_text("")
    records = read_all(tmp_path)
    found = files(records)
    told = [
        f"{f.relative_to(tmp_path)}/{n} is damaged and left out"
        for f, n in ((first, "structure.json"), (second, "training.csv"), (second, "routes.json"))
    ]
    top = str(found["report.md"]).partition("## What was run")[0].replace("\\", "")
    listed = [item.text_content() for item in html.fromstring(str(found["index.html"])).xpath("//header//li")]
    assert all(text in top and any(item.startswith(text) for item in listed) for text in told) and len(listed) == 3
    plots, _ = figures(pool(records))
    ratios = {plot.name.partition(".")[0]: {row["ratio"] for row in plot.rows} for plot in plots}
    assert [ratios[name] for name in OF_STRUCTURE] == [{0.6}] * 5
    assert ratios["training"] == {0.8}
    table = modules_table(pool(records))
    assert table and len(table.rows) == 1
    assert "tomoe at 80 %" in str(found["index.html"]).partition('id="texts"')[2]


def test_half_a_surrogate_pair_is_text_that_can_be_written(tmp_path: Path) -> None:
    (cell,) = runs(tmp_path, (0.6, 0))
    texts = copy.deepcopy(routed.routes()["texts"])
    for text in texts:
        text["name"] = text["tokens"][0] = "\ud800"
    (cell / "routes.json").write_text(json.dumps({"probability": "\ud800", "texts": texts}))
    records = read_all(tmp_path)
    assert records.problems == () and "\N{REPLACEMENT CHARACTER}".encode() in str(files(records)["index.html"]).encode()


def test_a_dense_model_is_not_asked_what_is_left_of_it(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record() | {"structure": {"compression": None}}])
    assert read_all(tmp_path).problems == ()


def test_figures_name_the_seed_whose_file_they_show(tmp_path: Path) -> None:
    first, second = runs(tmp_path, (0.6, 0), (0.6, 1))
    for damaged, shown in ((None, first), (first, second)):
        if damaged:
            (damaged / "structure.json").write_text("{")
        plots = {plot.name.partition(".")[0]: plot for plot in figures(pool(read_all(tmp_path)))[0]}
        for name in OF_STRUCTURE:
            assert {row["cells"] for row in plots[name].rows} == {shown.name}
            assert "first seed" in plots[name].caption and f"From 1 records: {shown.name}." in plots[name].caption
        assert {row["cells"] for row in plots["training"].rows} == {first.name}


def check(tmp_path_factory: pytest.TempPathFactory, name: str, text: str) -> None:
    """The report is made, and if the file is not named as damaged it can be drawn."""
    folder = tmp_path_factory.mktemp("results")
    (cell,) = runs(folder, (0.6, 0))
    (cell / name).write_text(text, encoding="utf-8")
    records = read_all(folder)
    "".join(map(str, files(records).values())).encode()
    assert all(f"{name} is damaged" in problem for problem in records.problems)
    if not records.problems:
        for plot in figures(pool(records))[0]:
            if plot.name.partition(".")[0] in DRAWN[name]:
                with styled():
                    FigureCanvasAgg(plot.draw(plot.rows)).draw()


def anywhere(name: str) -> Callable[..., Any]:
    """Other values in any place of a file."""
    content = json.loads(GOOD[name])
    mutated = st.builds(spoilt, st.just(content), st.sampled_from(list(places(content))), VALUES | st.just(GONE))
    cut = st.integers(0, len(GOOD[name])).map(lambda length: GOOD[name][:length])
    return given(text=mutated | cut)


ANY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY
@anywhere("structure.json")
def test_any_structure_is_shown_or_named(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check(tmp_path_factory, "structure.json", text)


@ANY
@anywhere("routes.json")
def test_any_routes_are_shown_or_named(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check(tmp_path_factory, "routes.json", text)


@ANY
@given(
    cut=st.integers(0, len(GOOD["training.csv"])),
    skip=st.integers(0, 9),
    put=st.text(st.characters(codec="utf-8"), max_size=3) | st.floats().map(repr),
)
def test_any_training_is_shown_or_named(
    tmp_path_factory: pytest.TempPathFactory, cut: int, skip: int, put: str
) -> None:
    text = GOOD["training.csv"]
    check(tmp_path_factory, "training.csv", text[:cut] + put + text[cut + skip :])
