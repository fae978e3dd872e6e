"""The web page in real headless Chromium: sorting, filtering, keyboard, phone, nothing fetched, nothing injected."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reports.figures import Gap
from reports.records import read_all
from reports.results import pool
from reports.unfinished import unfinished_table
from reports.web import page
from tests.reports import factory, routed
from tests.reports.test_web import EVIL, plot

PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
pytestmark = pytest.mark.skipif(
    None in PROGRAMS, reason="chromium or chromedriver is not there: apt-get install chromium chromium-driver"
)
GREEN = "rgba(0, 158, 115, 1)"
FIGURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4" cx="4" cy="4"/></svg>'


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("web")
    tomoe = factory.record(method="tomoe", ratio=0.6, notes=["a note"])
    del tomoe["metrics"]["wikileads/token_ppl@512"]
    factory.write(folder, [tomoe, *factory.matrix(), factory.record(EVIL, "tomoe", 0.5, provenance__command=EVIL)])
    for path in folder.rglob("record.json"):
        if json.loads(path.read_text())["cell"]["method"] == "tomoe":
            routed.write(path, routed.routes())
    made, records = folder / "index.html", read_all(folder)
    drawn = {"figures/a.svg": FIGURE, "figures/wide.svg": FIGURE.replace("<svg", '<svg width="900" height="300"')}
    gaps = [Gap(f"Figure {EVIL}", "tiny-llama", EVIL, EVIL)]
    made.write_text(
        page(records, pool(records), [plot("a"), plot("wide")], drawn, gaps, unfinished_table(records)),
        encoding="utf-8",
    )
    return made.as_uri()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"):
        options.add_argument(argument)
    options.binary_location = str(PROGRAMS[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(PROGRAMS[1])))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any, address: str) -> Iterator[Any]:
    """At the page, freshly loaded; afterwards nothing must have been fetched, run or complained about."""
    chromium.get("about:blank")
    chromium.get_log("performance")
    chromium.get(address)
    yield chromium
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url.partition("#")[0] for url in sent if not url.startswith("data:")} <= {address}
    assert chromium.execute_script("return window.hacked") is None


def _find(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def _column(browser: Any, name: str) -> list[str]:
    """The column's texts in the visible rows, from top to bottom."""
    return browser.execute_script(
        "const n = [...document.querySelectorAll('#board thead th')].findIndex(h => h.dataset.key === arguments[0]);"
        "return [...document.querySelectorAll('#board tbody tr:not([hidden])')].map(r => r.cells[n].textContent)",
        name,
    )


def _press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def _focused(browser: Any) -> str:
    return browser.switch_to.active_element.text


def test_a_column_sorts_both_ways_by_number_and_keeps_what_is_missing_last(browser: Any) -> None:
    name = "wikileads: ppl @512"
    (head,) = (head for head in _find(browser, "#board thead th") if head.get_attribute("data-key") == name)
    for state, sign in (("ascending", 1), ("descending", -1)):
        head.find_element("css selector", "button").click()
        assert head.get_attribute("aria-sort") == state
        *numbers, first, second = _column(browser, name)
        values = [sign * float(number.split()[0]) for number in numbers]
        assert first == second == "-" and values == sorted(values) and len(values) == 10
    assert "sort=wikileads%3A+ppl+%40512&down=1" in browser.current_url


def test_filters_narrow_rows_and_columns_and_the_address_keeps_them(browser: Any) -> None:
    from selenium.webdriver.support.select import Select

    for name, value in (("model", "tiny-llama"), ("ratio", "60"), ("task", "arc_easy")):
        Select(_find(browser, f"#board select[name={name}]")[0]).select_by_value(value)
    assert _column(browser, "Method") == ["shortgpt", "tomoe", "slicegpt"]
    shown = [head.get_attribute("data-key") for head in _find(browser, "#board thead th") if head.is_displayed()]
    assert shown == ["Method", "Model", "Asked, %", "Counted, %", "arc_easy: acc_norm", "Status"]
    assert _find(browser, "#count")[0].text == "3 of 12 rows"
    browser.refresh()
    assert len(_column(browser, "Method")) == 3
    _find(browser, "button[type=reset]")[0].click()
    assert len(_column(browser, "Method")) == 12 and "=" not in browser.current_url


def test_a_task_hides_rows_without_it_but_not_those_that_failed(browser: Any) -> None:
    from selenium.webdriver.support.select import Select

    Select(_find(browser, "#board select[name=task]")[0]).select_by_value("wikileads")
    found = zip(_column(browser, "wikileads: ppl @512"), _column(browser, "Status"), strict=True)
    assert [status for number, status in found if number == "-"] == [
        "failed: LinAlgError: eigenvalues of block 7 did not converge"
    ]
    assert _find(browser, "#count")[0].text == "11 of 12 rows"


def test_everything_works_with_keys_alone(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.execute_script("document.querySelector('#board select[name=task]').focus()")
    _press(browser, Keys.TAB)
    assert _focused(browser) == "Show all"
    _press(browser, Keys.TAB, Keys.TAB)  # by the table, which scrolls with the arrow keys
    assert _focused(browser).startswith("Method")
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    _press(browser, Keys.ENTER)
    methods = _column(browser, "Method")
    assert methods == sorted(methods) and "sort=Method" in browser.current_url


def test_a_row_opens_its_provenance_and_gives_the_focus_back(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    (button,) = (b for b in _find(browser, "tr[data-model=tiny-llama] .more") if b.text == "tomoe")
    browser.execute_script("arguments[0].focus()", button)
    _press(browser, Keys.ENTER)
    text = _find(browser, "dialog[open]")[0].text
    for part in ("tiny-llama, tomoe, 60 %", "a note", "4f2a9c1", "torch: 2.13.0", "cpu: 2 cores", "python run_all.py"):
        assert part in text
    _press(browser, Keys.ESCAPE)
    assert not _find(browser, "dialog[open]") and browser.switch_to.active_element == button


def test_tokens_tell_layer_expert_and_probability(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    text = _find(browser, ".tokens")[0]
    spans = text.find_elements("css selector", "span")
    assert spans[1].get_attribute("title") == "layer 2: expert 3 (0.4500)"
    browser.execute_script("arguments[0].focus()", text)
    _press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert _find(browser, ".told")[0].text == "“ El”, layer 2: expert 3 (0.4500)"
    _press(browser, Keys.ARROW_LEFT)
    assert _find(browser, ".told")[0].text == "“The”, layer 2: expert 2 (0.9000)"
    Select(_find(browser, ".routes select")[0]).select_by_visible_text("5")
    assert spans[1].get_attribute("title") == "layer 5: expert 2 (0.4500)"
    assert spans[1].get_attribute("class") == "e2 p0"
    spans[1].click()
    assert _find(browser, ".told")[0].text == "“ El”, layer 5: expert 2 (0.4500)"


def test_a_command_is_copied(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    button = _find(browser, "#missing .copy")[0]
    browser.execute_script("arguments[0].focus()", button)
    _press(browser, Keys.ENTER)
    assert button.text == "Copied"
    assert browser.execute_script("return getSelection().toString()") == button.find_element("xpath", "../code").text


def test_injected_names_are_shown_as_they_are(browser: Any) -> None:
    (row,) = (row for row in _find(browser, "#board tbody tr") if row.get_attribute("data-model") == EVIL)
    row.find_element("css selector", ".more").click()
    assert EVIL in _find(browser, "dialog[open]")[0].text


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    """The page on the narrowest phone."""
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_downwards(phone: Any, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    phone.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    phone.execute_script("document.querySelectorAll('details').forEach(place => place.open = true)")
    assert phone.execute_script("return document.documentElement.scrollWidth") == 360
    paper = phone.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]


def test_a_phone_shows_numbers_beside_methods_with_model_and_ratios(phone: Any) -> None:
    (row,) = (row for row in _find(phone, "tr[data-model=tiny-llama]") if row.text.startswith("tomoe"))
    method = row.find_element("css selector", "th")
    number = row.find_element("css selector", "td[data-value]:not(:nth-child(-n+4))")
    assert method.rect["x"] + method.rect["width"] <= number.rect["x"] < number.rect["x"] + number.rect["width"] <= 360
    below = phone.execute_script("return getComputedStyle(arguments[0], '::after').content", method)
    assert below == '"tiny-llama: 60\N{NO-BREAK SPACE}%, counted 59.79"'
    phone.execute_script("document.querySelector('.wide').scrollLeft = 300")
    assert number.rect["x"] < 0 < method.rect["x"]


def test_a_phone_shows_wide_figures_as_wide_as_they_are(phone: Any) -> None:
    narrow, wide = (image.size["width"] for image in _find(phone, "figure img"))
    assert narrow <= 360 and wide >= 900
    assert phone.execute_script("return document.documentElement.scrollWidth") == 360


def test_without_scripts_the_tables_and_texts_are_there(browser: Any, address: str) -> None:
    try:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.get(address)
        assert len(_find(browser, "#board tbody tr")) == 12 and not _find(browser, "#board form")[0].is_displayed()
        assert _find(browser, ".tokens span")[0].value_of_css_property("background-color") == GREEN
        assert "opens where" not in _find(browser, "#board")[0].text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_forced_colours_leave_the_experts_theirs(browser: Any) -> None:
    try:
        media = {"features": [{"name": "forced-colors", "value": "active"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert browser.execute_script("return matchMedia('(forced-colors: active)').matches")
        assert _find(browser, ".tokens span")[0].value_of_css_property("background-color") == GREEN
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page whose table is longer than a sheet, with names that have no place to break."""
    folder = tmp_path_factory.mktemp("long")
    factory.write(folder, [factory.record("model_" * 20, f"{'method_' * 20}{i}", 0.5) for i in range(60)])
    made, records = folder / "index.html", read_all(folder)
    made.write_text(page(records, pool(records), [], {}), encoding="utf-8")
    return made.as_uri()


def test_long_names_stay_in_their_cells(chromium: Any, long_page: str) -> None:
    chromium.get(long_page)
    cells = "[...document.querySelectorAll('#board :is(td, tbody th)')]"
    assert (
        chromium.execute_script(f"return {cells}.filter(cell => cell.scrollWidth > cell.clientWidth + 1).length") == 0
    )


NEEDS_PDFTOTEXT = pytest.mark.skipif(
    shutil.which("pdftotext") is None, reason="no pdftotext: apt-get install poppler-utils"
)


def _printed(chromium: Any, address: str, *options: str) -> str:
    """The text on its sheets of paper."""
    chromium.get(address)
    # A page that was never shown is sometimes printed as a blank sheet.
    chromium.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    sheets = base64.b64decode(chromium.print_page())
    command = ["pdftotext", *options, "-", "-"]
    return subprocess.run(command, input=sheets, capture_output=True, check=True).stdout.decode()


@NEEDS_PDFTOTEXT
def test_every_printed_sheet_has_the_header_of_the_table(chromium: Any, long_page: str) -> None:
    sheets = [sheet for sheet in _printed(chromium, long_page, "-layout").split("\f") if "49.79" in sheet]
    assert len(sheets) > 1 and all(" ppl" in sheet and "acc_norm" in sheet for sheet in sheets)


@NEEDS_PDFTOTEXT
def test_print_shows_what_is_folded(chromium: Any, address: str) -> None:
    text = _printed(chromium, address)
    folded = "details:not([open]) > :is(.note, .tokens, .command)"
    closed = f"return [...document.querySelectorAll('{folded}')].map(place => place.textContent.slice(0, 9))"
    hidden = chromium.execute_script(closed)
    assert len(hidden) > 3 and all(start in text for start in hidden)


@NEEDS_PDFTOTEXT
@pytest.mark.parametrize("count", [8, 20, 50])
def test_print_cuts_no_column_off(chromium: Any, tmp_path: Path, count: int) -> None:
    dense, failed = factory.record(), factory.failed("tiny-llama", "sleb", 0.5, "Ω")  # one letter breaks nowhere
    dense["metrics"] |= {f"a_task_{i}/acc@5shot": dense["metrics"]["arc_easy/acc@0shot"] for i in range(count)}
    made, records = tmp_path / "index.html", read_all(factory.write(tmp_path, [dense, failed]))
    made.write_text(page(records, pool(records), [], {}), encoding="utf-8")
    assert "Ω" in _printed(chromium, made.as_uri())  # in the last column
