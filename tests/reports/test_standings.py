"""Who is best, who is tied, who could not be tested, and the tables that say so."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from reports.accuracy import zero_shot_table
from reports.formats import FORMATS
from reports.perplexity import perplexity_standings, perplexity_table
from reports.records import Records, read_all
from reports.render import files
from reports.results import Result, pool
from reports.significance import intervals_table, significance_table
from reports.statistics import holm
from reports.tables import Cell, Table
from tests.reports import factory

ARC, PIQA, TEXT = "arc_easy/acc_norm@0shot", "piqa/acc@0shot", "wikileads/token_ppl@512"
COUNT = 60


def right(count: int) -> list[float]:
    """The first `count` documents right."""
    return [1.0] * count + [0.0] * (COUNT - count)


def made(method: str, arc: int, ratio: float = 0.6, nats: float = 3.0, seed: int = 0, **changes: Any) -> dict:
    """A record with samples; perplexities differ by nearly the same on each of twelve windows."""
    noise = np.random.default_rng(len(method)).normal(0, 0.01, 12)
    content = factory.record("tiny-llama", method, ratio, seed, **changes)
    return factory.sampled(content, {ARC: right(arc), PIQA: right(40), TEXT: (nats + noise).tolist()})


def results(tmp_path: Path, *records: dict[str, Any]) -> list[Result]:
    return pool(read_all(factory.write(tmp_path, list(records))))


def column(table: Table | None, label: str) -> dict[str, Cell]:
    """The cells below a header, by method."""
    assert table
    index = [str(header) for header in table.columns].index(label)
    method = [str(header) for header in table.columns].index("Method")
    return {str(row[method]): row[index] for row in table.rows}


def standing(cell: Cell) -> str:
    return "best" if cell.best else "tied" if "≈" in cell.marks else ""


def rows_of(results: list[Result]) -> list[dict[str, str]]:
    table = significance_table(results)
    assert table
    return list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))


METHODS = {"dense": 59, "shortgpt": 50, "slicegpt": 48, "sleb": 20}


@pytest.fixture
def found(tmp_path: Path) -> list[Result]:
    records = [made(name, arc, 1.0 if name == "dense" else 0.6, 3 + (60 - arc) / 20) for name, arc in METHODS.items()]
    return results(tmp_path, *records)


def test_best_and_tied_are_marked_and_dense_does_not_compete(found: list[Result]) -> None:
    arc = column(zero_shot_table(found), "arc_easy: acc_norm")
    assert {name: standing(cell) for name, cell in arc.items()} == {
        "dense": "",
        "shortgpt": "best",
        "slicegpt": "tied",
        "sleb": "",
    }
    text = column(perplexity_table(found), "wikileads @512: 60 %")
    assert [standing(text[name]) for name in METHODS] == ["", "best", "", ""]


def test_equal_numbers_are_equally_best(found: list[Result]) -> None:
    piqa = column(zero_shot_table(found), "piqa: acc")
    assert [standing(piqa[name]) for name in METHODS] == ["", "best", "best", "best"]


def test_tests_are_scipys_and_corrected_over_the_table(found: list[Result]) -> None:
    rows = [row for row in rows_of(found) if row["Table"] == "zero-shot"]
    by = {(row["Measured"], row["Method"]): row for row in rows}
    assert float(by[ARC, "slicegpt"]["p"]) == pytest.approx(stats.binomtest(0, 2).pvalue)
    assert float(by[ARC, "sleb"]["p"]) == pytest.approx(stats.binomtest(0, 30).pvalue)
    assert float(by[ARC, "sleb"]["Difference"]) == pytest.approx(-50)
    assert float(by["average of 2 tasks", "sleb"]["Difference"]) == pytest.approx(-25)
    tested = [row for row in rows if row["p"]]
    assert len(tested) == 6
    assert [float(row["p (Holm)"]) for row in tested] == pytest.approx(holm([float(row["p"]) for row in tested]))
    assert [row["Verdict"] for row in rows if row["Measured"] == ARC] == ["best", "tied", "worse"]
    assert {row["Model"] for row in rows} == {"tiny-llama at 60 %"}


def test_the_best_stands_above_what_was_tested_against_it(found: list[Result]) -> None:
    table = significance_table(found)
    assert table
    best = [(row[2].value, row[3].value) for row in table.rows if row[3].best]
    assert (TEXT, "shortgpt") in best and len(best) == len({row[2].value for row in table.rows}) == 4
    assert [row[-1].value for row in table.rows[:3]] == ["best", "worse", "worse"]


def test_tests_fit_on_two_pages_side_by_side(found: list[Result]) -> None:
    """Wide columns that name a row would be repeated beside every single number."""
    table = significance_table(found)
    assert table and FORMATS["tex"](table).count("{tabular}") == 2 * 2


def test_perplexities_are_compared_as_ratios(found: list[Result]) -> None:
    row = next(row for row in rows_of(found) if row["Table"] == "perplexity" and row["Method"] == "sleb")
    values = {result.method: result.metric(TEXT) for result in found}
    best, other = values["shortgpt"], values["sleb"]
    assert best and other and float(row["Difference"]) == pytest.approx(other.value / best.value)
    assert 1 < float(row["95 % interval: from"]) < float(row["Difference"]) < float(row["95 % interval: to"])


@pytest.mark.parametrize("other", [{"cell__ratio_basis": "block"}, {"cell__dtype": "bfloat16"}])
def test_ratios_of_another_basis_and_other_data_types_do_not_compete(tmp_path: Path, other: dict[str, str]) -> None:
    records = [made("sleb", 40), made("random", 20), made("slicegpt", 50, **other), made("shortgpt", 45, **other)]
    cells = column(zero_shot_table(results(tmp_path, *records)), "arc_easy: acc_norm")
    found = {method.partition(" ")[0]: standing(cell) for method, cell in cells.items()}
    assert (found["sleb"], found["slicegpt"]) == ("best", "best")


def test_off_budget_fine_tuned_and_other_ratios_do_not_compete(tmp_path: Path) -> None:
    off = made("wanda", 58, size__on_budget=False)
    tuned = [made(name, arc, cell__recover={"kind": "lora"}) for name, arc in (("shortgpt", 57), ("slicegpt", 20))]
    for content in tuned:
        content["cell"]["id"] += "-tuned"
    plain = [made("shortgpt", 50), made("slicegpt", 30), made("sleb", 55, 0.8)]
    table = zero_shot_table(results(tmp_path, off, *tuned, *plain))
    marked = {name: standing(cell) for name, cell in column(table, "arc_easy: acc_norm").items()}
    assert marked["wanda"] == marked["sleb"] == "" and marked["shortgpt"] == "best"
    assert marked["shortgpt + fine-tuning"] == "best" and marked["slicegpt + fine-tuning"] == ""


IMPOSSIBLE = [math.nan, math.inf, -math.inf, -5.0]


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [(TEXT, value, "wikileads @512: 60 %") for value in (*IMPOSSIBLE, 0.0, 0.99)]
    + [(ARC, value, "arc_easy: acc_norm") for value in (*IMPOSSIBLE, 50.0, 1.01)],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_numbers_that_cannot_be_do_not_compete(tmp_path: Path, name: str, value: float, label: str, seeds: int) -> None:
    wrong = made("shortgpt", 58, nats=2.0)
    wrong["metrics"][name]["value"] = value
    others = [made("slicegpt", 40), made("sleb", 38), made("random", 36, nats=4.0)]
    found = results(tmp_path, wrong, *(made("shortgpt", 58, seed=seed) for seed in range(1, seeds)), *others)
    cells = column(perplexity_table(found) if name == TEXT else zero_shot_table(found), label)
    assert standing(cells["shortgpt"]) == "" and standing(cells["slicegpt"]) == "best"


def test_the_least_and_the_greatest_value_that_can_be_compete(tmp_path: Path) -> None:
    found = results(tmp_path, made("shortgpt", 60, nats=0.0), made("slicegpt", 40))
    for name, value in ((TEXT, 1.0), (ARC, 1.0)):
        for record in found[0].records:
            record.metrics[name] = replace(record.metrics[name], value=value)  # type: ignore[index]
    assert column(perplexity_table(found), "wikileads @512: 60 %")["shortgpt"].best
    assert column(zero_shot_table(found), "arc_easy: acc_norm")["shortgpt"].best


def test_ratios_beyond_reading_have_an_exponent(tmp_path: Path) -> None:
    rows = rows_of(results(tmp_path, made("shortgpt", 50), made("slicegpt", 40, nats=600.0)))
    assert float(rows[1]["Difference"]) > 1e200
    table = significance_table(results(tmp_path / "b", made("shortgpt", 50), made("slicegpt", 40, nats=600.0)))
    assert table and max(len(str(cell)) for cell in table.rows[1]) < 30


def test_without_samples_the_best_is_bold_and_nothing_is_claimed(tmp_path: Path) -> None:
    found = results(tmp_path, *factory.matrix())
    table = zero_shot_table(found)
    assert table and any(cell.best for row in table.rows for cell in row)
    assert not any("≈" in cell.marks for row in table.rows for cell in row)
    assert "No method is called tied with the best: there are no scores per document to test it with." in table.notes
    assert significance_table(found) is None


def test_what_could_not_be_tested_is_named_with_the_reason(tmp_path: Path) -> None:
    bare, other = made("sleb", 49), made("wanda", 48)
    del bare["samples"]
    other["provenance"] = other["provenance"] | {"task_versions": {"arc_easy@0shot": "2.0"}}
    found = results(tmp_path, made("shortgpt", 50), made("slicegpt", 48), bare, other)
    table = zero_shot_table(found)
    assert table and "Not tested, so not called tied: tiny-llama sleb at 60 % (no samples)." in table.notes
    assert any("wanda at 60 % (task version 2.0, not 1.0)" in note for note in table.notes)
    verdicts = {row["Method"]: row["Verdict"] for row in rows_of(found) if row["Measured"] == ARC}
    assert verdicts == {"shortgpt": "best", "slicegpt": "tied"}


def test_what_is_wholly_untested_is_named_as_a_whole(tmp_path: Path) -> None:
    records = [made(name, arc, ratio) for ratio in (0.8, 0.6) for name, arc in (("sleb", 50), ("wanda", 48))]
    for bare in records[:2]:
        del bare["samples"]
    for method in ("sleb", "wanda", "slicegpt"):
        records.append(factory.record("smollm2-135m-q4", method, 0.6))
    table = zero_shot_table(results(tmp_path, *records))
    assert table and [note for note in table.notes if note.startswith("Not tested")] == [
        "Not tested, so not called tied: all of tiny-llama at 80 %; all of smollm2-135m-q4 (the best has no samples)."
    ]


def test_best_without_samples_is_said_to_be_the_reason(tmp_path: Path) -> None:
    bare = made("shortgpt", 55, nats=2.5)
    del bare["samples"]
    found = results(tmp_path, bare, made("slicegpt", 48), made("sleb", 47))
    (race,) = perplexity_standings(found).races
    assert [rival.why for rival in race.rivals] == ["the best has no samples"] * 2


def test_seeds_are_resampled_and_not_counted(tmp_path: Path) -> None:
    seeds = [made("shortgpt", arc, seed=seed) for seed, arc in enumerate((50, 40))]
    found = results(tmp_path, *seeds, made("slicegpt", 30))
    row = next(row for row in rows_of(found) if row["Measured"] == ARC and row["Method"] == "slicegpt")
    assert float(row["Difference"]) == pytest.approx(-25) and row["Verdict"] == "worse"


def test_alone_there_is_no_best(tmp_path: Path) -> None:
    found = results(tmp_path, made("shortgpt", 50))
    assert perplexity_standings(found).races == ()
    table = zero_shot_table(found)
    assert table and not any(cell.best for row in table.rows for cell in row)


def test_intervals_are_wilsons(found: list[Result]) -> None:
    table = intervals_table(found)
    expected = stats.binomtest(50, COUNT).proportion_ci(method="wilson")
    ends = [column(table, f"{ARC}: {end}")["shortgpt"].value for end in ("from", "to")]
    assert ends == pytest.approx([100 * expected.low, 100 * expected.high])


def test_the_report_explains_the_marks_that_it_has(found: list[Result], tmp_path: Path) -> None:
    tested = " ".join(files(Records(record for result in found for record in result.records))["report.md"].split())
    assert "the table *Significance of differences* has every test" in tested
    bare = " ".join(files(read_all(factory.write(tmp_path / "bare", factory.matrix())))["report.md"].split())
    assert "no difference was tested" in bare and "has every test" not in bare


def test_the_verdict_is_that_of_the_corrected_p(tmp_path: Path) -> None:
    found = results(tmp_path, *(made(name, arc) for name, arc in (("shortgpt", 50), ("slicegpt", 44), ("sleb", 50))))
    row = next(row for row in rows_of(found) if row["Measured"] == ARC and row["Method"] == "slicegpt")
    assert float(row["p"]) < 0.05 < float(row["p (Holm)"]) and row["Verdict"] == "tied"


def test_dense_models_of_two_settings_do_not_compete(tmp_path: Path) -> None:
    other = made("dense", 40, 1.0, cell__budget={"name": "smoke"}, cell__id="other")
    table = zero_shot_table(results(tmp_path, made("dense", 50, 1.0), other))
    assert table and len(table.rows) == 2 and not any(cell.best for row in table.rows for cell in row)
