"""The web page without a browser: what stands in it."""

import base64
import csv
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from matplotlib.figure import Figure

from reports.figures import Plot
from reports.records import MAKE_ONE, Records, read_all
from reports.render import files
from reports.results import pool
from reports.web import page
from tests.reports import factory, routed

EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'&"


def plot(name: str) -> Plot:
    """A figure that is drawn already."""
    return Plot(name=name, title=f"{name} & co", caption="What <b> is.", rows=[], draw=lambda rows: Figure())


def _tree(tmp_path: Path, records: list[dict[str, Any]], pictures: dict[str, str | bytes] | None = None) -> Any:
    names = dict.fromkeys(name.removeprefix("figures/").partition(".")[0] for name in pictures or {})
    found = read_all(factory.write(tmp_path, records))
    return html.fromstring(page(found, pool(found), [*map(plot, names)], pictures or {}))


def _rows(tree: Any) -> list[list[str]]:
    return [[cell.text_content() for cell in row] for row in tree.xpath("//*[@id='board']//tbody/tr")]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The whole report of a half-filled matrix."""
    return files(read_all(factory.write(tmp_path_factory.mktemp("matrix"), factory.matrix())))


def _embedded(tree: Any, name: str) -> Any:
    return json.loads(tree.get_element_by_id(name).text)


def test_the_leaderboard_has_the_numbers_and_marks_of_the_tables(matrix: Mapping[str, Any]) -> None:
    tree = html.fromstring(matrix["index.html"])
    heads = [head.get("data-key") for head in tree.xpath("//*[@id='board']//thead//th")]
    shown = {(row[1], row[0], row[2]): row for row in _rows(tree)}
    rows = tree.xpath("//*[@id='board']//tbody/tr")
    table = html.fromstring(matrix["zero-shot.html"])
    model = ""
    for row in table.xpath("//tbody/tr"):
        texts = [cell.text_content() for cell in row]
        model = texts[0] or model
        own = shown[model, texts[3], texts[1]]
        assert own[3] == texts[2].partition(" (")[0] and own[heads.index("wikileads_mc: acc")] == texts[-2]
        assert own[heads.index("Zero-shot: Average")] == texts[-1]
    best = {cell.text_content() for row in rows for cell in row.xpath("td/strong")}
    assert {cell.text_content() for cell in table.xpath("//td/strong")} < best
    assert any("†" in row[3] for row in _rows(tree))
    narrow = [row.xpath("string(th/@data-where)").replace("\N{NO-BREAK SPACE}", " ") for row in rows]
    assert "tiny-llama: 60 %, counted 64.12†" in narrow and "tiny-llama: 60 %" in narrow  # which failed


def test_every_column_sorts_by_a_key_of_its_own(tmp_path: Path) -> None:
    record = factory.record()
    for task in ("arc_easy/acc@25shot", "gsm8k/acc@5shot"):
        record["metrics"][task] = record["metrics"]["arc_easy/acc@0shot"]
    heads = _tree(tmp_path, [record]).xpath("//*[@id='board']//thead//th")
    keys = [head.get("data-key") for head in heads]
    assert len(set(keys)) == len(keys) and {"Zero-shot: Average", "Few-shot: Average"} < {*keys}
    assert {"Zero-shot", "Few-shot"} < {head.get("data-task") for head in heads}


def test_infinite_numbers_are_numbers_to_the_script(tmp_path: Path) -> None:
    record = factory.record(method="sleb", ratio=0.8)
    record["metrics"] = {"wikileads/token_ppl@512": {"value": float("inf"), "stderr": None, "n": 8}}
    values = _tree(tmp_path, [record]).xpath("//*[@id='board']//td/@data-value")
    assert values[-1] == "Infinity" and "inf" not in values


def test_what_failed_is_in_it_with_the_reason(tmp_path: Path) -> None:
    tree = _tree(tmp_path, factory.matrix())
    (row,) = (row for row in _rows(tree) if row[-1].startswith("failed"))
    assert row[:3] == ["slicegpt", "tiny-llama", "60"] and row[-1].endswith("block 7 did not converge")
    assert set(row[3:-1]) == {"-"}


def test_what_is_missing_is_said_model_by_model_with_the_command(matrix: Mapping[str, Any]) -> None:
    tree = html.fromstring(matrix["index.html"])
    cells, drawings = _lacking(tree)
    assert not tree.xpath("//*[@id='board']//*[@class='command']")
    (row,) = csv.DictReader(matrix["unfinished.csv"].splitlines())
    why = "slicegpt at 60 %, seed 0: failed, LinAlgError: eigenvalues of block 7 did not converge"
    assert cells == {"tiny-llama": {row["Command"]: why}}
    told = re.findall(r"^\* (.*), (\S+): (.*)\. To have it: (.*)$", matrix["report.md"], re.MULTILINE)
    assert len(told) > 9 and {model for _, model, *_ in told} == set(drawings)
    for title, model, why, command in told:
        assert f"{title}: {why}" in drawings[model][command.replace("\\", "")].split("; ")


def _lacking(tree: Any) -> tuple[dict[str, dict[str, str]], ...]:
    """By model and command what is missing: the cells, which are shown, and the figures, which are folded."""
    return tuple(
        {
            place.findtext("summary"): {
                line.findtext("code"): line.getprevious().text for line in place.xpath("*[@class='command']")
            }
            for place in tree.xpath(f"//*[@id='missing']/details[{state}]")
        }
        for state in ("@open", "not(@open)")
    )


def test_without_records_there_is_only_the_command_that_makes_the_first(tmp_path: Path) -> None:
    tree = html.fromstring(str(files(read_all(tmp_path))["index.html"]))
    assert tree.xpath("//*[@class='command']/code/text()") == [MAKE_ONE.format("results")]
    assert tree.xpath("//table/ancestor::*[@hidden]") and not tree.xpath("//*[@id='missing' or @id='run']")


def test_provenance_is_there_once_per_cell(tmp_path: Path) -> None:
    first = factory.record(time__load_s=0.1234567890123)
    tree = _tree(tmp_path, [first, factory.record(seed=1), factory.record(method="shortgpt", ratio=0.8)])
    details = _embedded(tree, "details")
    assert [len(records) for records in details["rows"]] == [2, 1]
    lines = [dict(details["lines"][number] for number in record) for record in details["rows"][0]]
    assert [line["seed"] for line in lines] == ["0", "1"]
    assert lines[0]["git commit"] == "4f2a9c1" and lines[0]["device"] == "cpu: 2 cores"
    assert lines[0]["load s"] == "0.1234567890123"
    assert lines[0]["dataset revisions"] == "wikileads: 0.0.7; moby-dick: 0.2.3"
    assert lines[0]["command"].startswith("python run_all.py")


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    record = factory.record(EVIL, EVIL, 0.5, error=EVIL, notes=[EVIL], provenance__command=EVIL)
    record["metrics"] = {f"{EVIL}/acc@0shot": record["metrics"]["arc_easy/acc@0shot"]}
    tree = _tree(tmp_path, [record])
    assert len(tree.xpath("//script")) == 3 and not tree.xpath("//img")
    assert EVIL in _rows(tree)[0]
    assert ["command", EVIL] in _embedded(tree, "details")["lines"]


def test_only_its_own_script_may_run_and_nothing_is_fetched(tmp_path: Path) -> None:
    tree = _tree(tmp_path, factory.matrix())
    (policy,) = tree.xpath("//meta[@http-equiv]/@content")
    digest = base64.b64encode(hashlib.sha256(tree.xpath("//script")[-1].text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"script-src 'sha256-{digest}'" in policy
    assert not [link for *_, link, _ in tree.iterlinks() if not link.startswith(("#", "data:"))]


def test_figures_are_data(tmp_path: Path) -> None:
    pictures: dict[str, str | bytes] = {"figures/a.svg": "<svg/>", "figures/b.svg": "<svg> </svg>"}
    tree = _tree(tmp_path, [factory.record()], pictures)
    images = tree.xpath("//*[@id='figures']//img")
    assert [image.get("alt") for image in images] == ["a & co", "b & co"]
    assert [text.text_content() for text in tree.xpath("//figcaption")] == [f"{x} & co. What <b> is." for x in "ab"]
    assert {image.get("src").partition(",")[0] for image in images} == {"data:image/svg+xml;base64"}
    assert [base64.b64decode(image.get("src").partition(",")[2]) for image in images] == [b"<svg/>", b"<svg> </svg>"]


def _routed(tmp_path: Path, **damage: Any) -> Any:
    factory.write(tmp_path, [factory.record(), *(factory.record(method="tomoe", ratio=r) for r in (0.7, 0.5))])
    for path in tmp_path.rglob("record.json"):
        if (ratio := json.loads(path.read_text())["cell"]["ratio"]) < 1:
            routed.write(path, routed.routes(experts=4 if ratio == 0.7 else 12) | damage)
    found = read_all(tmp_path)
    return html.fromstring(page(found, pool(found), [], {}))


def test_texts_show_the_smallest_ratio_with_every_token_in_its_colour(tmp_path: Path) -> None:
    tree = _routed(tmp_path)
    assert [place.text for place in tree.xpath("//*[@class='routes']/summary")] == ["tiny-llama tomoe at 50 %"]
    first = tree.xpath("//*[contains(@class, 'tokens')]")[0]
    spans = first.xpath("span")
    assert "numbered" in first.get("class")
    assert [span.get("data-expert") for span in spans] == [str((t + 2) % 12) for t in range(9)]  # the middle layer
    assert [spans[t].get("class") for t in (0, 6, 7)] == ["e2 p0", "e0 p1", "e1 p1"]
    assert [span.text for span in spans[2:8]] == ["be", " <b>", "◌", "模", "⏎", "␣␣␣␣"]
    assert _embedded(tree, "routes")[0][0][1]["experts"][:2] == [[2], [3]]


def test_damaged_texts_are_left_out(tmp_path: Path) -> None:
    tree = _routed(tmp_path, texts=[])
    assert not tree.xpath("//*[@id='texts']") and len(tree.xpath("//header//li")) == 2


def test_twice_the_same(tmp_path: Path) -> None:
    records = read_all(factory.write(tmp_path, factory.matrix()))
    assert page(records, pool(records), [], {}) == page(records, pool(records), [], {})


@pytest.mark.parametrize("records", [[factory.failed("tiny-llama", "tomoe", 0.5, "no memory", "skipped")]])
def test_a_run_without_numbers_has_a_page(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    assert _rows(_tree(tmp_path, records)) == [["tomoe", "tiny-llama", "50", "-", "skipped: no memory"]]


def test_the_script_uses_as_many_looks_as_the_page(tmp_path: Path) -> None:
    assert len(set(re.findall(r"^\.e\d", page(Records([]), pool([]), [], {}), re.MULTILINE))) == 8


def test_problems_stand_at_the_top(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    tree = _tree(tmp_path, [factory.record()])
    assert [item.text_content().startswith("record.json is damaged") for item in tree.xpath("//header//li")] == [True]


@pytest.mark.parametrize(
    ("kind", "said"), [("total", "of all parameters"), ("block", "of the parameters of the blocks")]
)
def test_the_leaderboard_says_what_its_shares_are_of(tmp_path: Path, kind: str, said: str) -> None:
    record = factory.record(method="sleb", ratio=0.6, cell__ratio_basis=kind)
    contents = files(read_all(factory.write(tmp_path, [factory.record(), record])))
    board = html.fromstring(str(contents["index.html"])).get_element_by_id("board")
    assert f"Shares are {said}" in board.text_content()
