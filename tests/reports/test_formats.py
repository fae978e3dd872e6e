"""One table, five renderings: the same numbers in each, and no text that breaks out of its cell."""

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from reports.accuracy import zero_shot_table
from reports.formats import FORMATS, escape_markdown
from reports.perplexity import perplexity_table
from reports.records import read_all
from reports.render import build
from reports.results import pool
from reports.tables import Cell, Column, Table, plain
from reports.terminal import terminal
from tests.reports import factory

GOLDENS = Path(__file__).parent / "goldens"
RESULTS = Path(__file__).parents[2] / "results"
ENDLESS = 10**6
HOSTILE = "[a]_b|c<d>&%${}#^~\\\"'`--x*y*"


class Grid(HTMLParser):
    """Reads the rows of body cells of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a row or a cell; nothing but the best may be marked up inside a cell."""
        if tag == "strong":
            return
        assert not self.inside, f"<{tag}> inside a cell"
        self.inside = tag == "td"
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Close a cell."""
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        """Collect a cell's text."""
        if self.inside:
            self.rows[-1][-1] += data


def read_html(text: str) -> list[list[str]]:
    """The body of the tables of a page."""
    return [row for row in Grid(text).rows if row]


def read_markdown(text: str) -> list[list[str]]:
    """The body of the table, as an independent markdown parser renders it."""
    return read_html(MarkdownIt("commonmark").enable("table").render(text))


def read_latex(text: str) -> list[list[str]]:
    """The body of a tabular, each cell as LaTeX sets it."""
    body = text.split("\\midrule\n", 1)[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    body = re.sub(r"\\textbf\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", body)
    lines = [line.removesuffix(r" \\") for line in body.splitlines()]
    return [[undone(cell.strip()) for cell in re.split(r"(?<!\\)& ", line)] for line in lines]


def undone(cell: str) -> str:
    """The text of an escaped cell; whatever could not stand in one fails."""
    matches = list(LATEX_TOKEN.finditer(cell))
    assert "".join(match[0] for match in matches) == cell, f"not escaped: {cell!r}"
    return "".join(LATEX_NAMES.get(inner, inner) for inner in (match[match.lastindex or 0] for match in matches))


LATEX_NAMES = {
    **{"textbackslash": "\\", "textasciicircum": "^", "textasciitilde": "~", "textless": "<", "textgreater": ">"},
    **{"textbar": "|", "textquotesingle": "'", "textasciigrave": "`", "textdagger": "†", "textdaggerdbl": "‡"},
    **{"textpm": "±", "textsection": "§", "approx": "≈", "ttfamily": '"', "textparagraph": "¶"},
}
LATEX_TOKEN = re.compile(
    r"""\\ensuremath\{\\(approx)\}
    | \\(text[a-z]+)\{\}         # a named sign
    | \{\\(ttfamily)\\char34\}    # a straight quote
    | \\([{}$&#%_])              # a sign of LaTeX's own
    | \{([][*])\}               # what the end of a row would take for its option
    | (-)\{\}(?=-)              # not a dash
    | \\allowbreak\{\}()         # where a line may end
    | -(?!-)
    | [^-\\{}$&#%_^~<>|"'`[\]*]""",
    re.VERBOSE,
)


def read_terminal(text: str) -> list[list[str]]:
    """The body of the only panel of a table; a cell begins where its column's rule does."""
    lines = text.split("\n\n")[2].splitlines()
    (rule,) = (index for index, line in enumerate(lines) if re.fullmatch(r"[- ]+", line) and "--" in line)
    spans = [match.span() for match in re.finditer("-+", lines[rule])]
    return [[line[start:end].strip() for start, end in spans] for line in lines[rule + 1 :]]


READERS: dict[str, Callable[[str], list[list[str]]]] = {
    "md": read_markdown,
    "html": read_html,
    "tex": read_latex,
    "terminal": read_terminal,
}
RENDERERS = FORMATS | {"terminal": partial(terminal, width=ENDLESS)}


def table_of(*rows: tuple[Cell, ...]) -> Table:
    """A table with a text and a number column."""
    columns = (Column("Name", text=True), Column("Value", "Group"))
    return Table(name="t", title="Title", caption="Caption.", columns=columns, rows=rows)


def paper_tables(tmp_path: Path) -> list[Table]:
    """The two tables of the paper, of the factory's records."""
    results = pool(read_all(factory.write(tmp_path, factory.matrix())))
    return [table for table in (perplexity_table(results), zero_shot_table(results)) if table]


@pytest.mark.parametrize("suffix", READERS)
@example(text=HOSTILE)
@example(text="<script>alert(1)</script>")
@example(text="two\nlines \x1b[31m\x00")
@example(text="_a_ a_b __a__ - # ~~x~~ https://example.org")
@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(max_codepoint=0x24F, exclude_categories=["Cs"])))
def test_any_text_survives_in_its_cell(suffix: str, text: str) -> None:
    shown = plain(text)
    if suffix == "terminal" and len(shown) > 36:
        return
    if suffix.endswith("tex"):
        shown = "".join(char if char.isascii() or char in "±§¶" else f"[U+{ord(char):04X}]" for char in shown)
    table = table_of((Cell(text), Cell(1.5)), (Cell("last"), Cell(None)))
    assert READERS[suffix](RENDERERS[suffix](table)) == [[shown, "1.50"], ["last", "-"]]


@settings(deadline=None)
@given(text=st.text())
def test_any_text_survives_in_csv(text: str) -> None:
    rows = list(csv.reader(io.StringIO(FORMATS["csv"](table_of((Cell(text), Cell(1.5)))))))
    assert rows == [["Name", "Group: Value"], [plain(text), "1.5"]]


@settings(deadline=None)
@given(value=st.floats(allow_nan=False), error=st.floats(0, allow_infinity=False))
def test_csv_keeps_every_digit(value: float, error: float) -> None:
    _, row = csv.reader(io.StringIO(FORMATS["csv"](table_of((Cell("a"), Cell(value, error))))))
    assert (float(row[1]), float(row[2])) == (value, error)


@pytest.fixture(scope="module")
def every() -> list[Table]:
    """All tables of the committed records."""
    records = read_all(RESULTS)
    return build(records, pool(records), usd_per_hour=2.5)


@pytest.fixture
def unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide and long as they are."""
    for limit in ("reports.latex.LINE", "reports.pages.PAGE", "reports.terminal.WIDEST"):
        monkeypatch.setattr(limit, ENDLESS)


@pytest.mark.usefixtures("unbroken")
@pytest.mark.parametrize("suffix", READERS)
def test_every_table_reads_the_same_in_every_format(every: list[Table], suffix: str) -> None:
    star = "*" if suffix == "terminal" else ""
    for table in every:
        shown = [[f"{text}{star * cell.best}" for text, cell in zip(*row, strict=True)] for row in both(table)]
        assert READERS[suffix](RENDERERS[suffix](table)) == shown, table.name


def both(table: Table) -> Iterator[tuple[list[str], tuple[Cell, ...]]]:
    """The rows as they are shown, and their cells."""
    return zip(table.shown, table.rows, strict=True)


def test_every_table_has_the_numbers_of_its_csv(every: list[Table]) -> None:
    for table in every:
        exact = csv.DictReader(io.StringIO(FORMATS["csv"](table)))
        for shown, row in zip(table.shown, exact, strict=True):
            for column, text in zip(table.columns, shown, strict=True):
                if not column.text:
                    assert_same_number(text, row[str(column)], row.get(f"{column} ±", ""))


def assert_same_number(text: str, value: str, error: str) -> None:
    """The shown `1.23 ± 0.04 (remark)†` is the exact value and error, rounded."""
    if text.startswith("<"):
        assert float(value) < float(text[1:])
        return
    shown = re.findall(r"-?\d+(?:\.\d+)?", text.partition(" (")[0])
    assert len(shown) == (value != "") + (error != "")
    for short, long in zip(shown, (value, error), strict=False):
        assert float(short) == round(float(long), len(short.partition(".")[2]))


@pytest.mark.parametrize(
    ("suffix", "bold"),
    [("md", r"**1.50 (\*a\_)**"), ("html", "<strong>1.50 (*a_)</strong>"), ("tex", r"\textbf{1.50 ({*}a\_)}")],
)
def test_the_best_is_bold_and_escaped(suffix: str, bold: str) -> None:
    table = table_of((Cell("a"), Cell(1.5, remark="*a_", best=True)), (Cell("b"), Cell(1.5, marks="≈")))
    text = FORMATS[suffix](table)
    assert text.count(bold) == 1
    assert READERS[suffix](text) == [["a", "1.50 (*a_)"], ["b", "1.50≈"]]
    assert "1.5,*a_ best" in FORMATS["csv"](table) and "1.5,≈" in FORMATS["csv"](table)


def test_a_number_may_be_written_otherwise_for_readers() -> None:
    table = table_of((Cell("a"), Cell(0.0004, digits="<0.001")))
    assert table.shown == [["a", "<0.001"]] and "a,0.0004" in FORMATS["csv"](table)


def test_a_block_is_named_once_and_ruled_off() -> None:
    table = table_of((Cell("a"), Cell(1)), (Cell("a"), Cell(2)), (Cell("b"), Cell(3)))
    assert table.shown == [["a", "1"], ["", "2"], ["b", "3"]]
    assert FORMATS["tex"](table).count(r"\midrule") == 2
    assert FORMATS["html"](table).count('<tr class="block">') == 1
    assert [row[0] for row in csv.reader(io.StringIO(FORMATS["csv"](table)))] == ["Name", "a", "a", "b"]


@pytest.mark.parametrize("suffix", ["md", "tex", "csv", "html"])
def test_golden_perplexity_table(tmp_path: Path, suffix: str) -> None:
    assert FORMATS[suffix](paper_tables(tmp_path)[0]) == (GOLDENS / f"perplexity.{suffix}").read_text(encoding="utf-8")


DOCUMENTS = ("standalone", "article", "article,twocolumn", "article,12pt")
PAPER = r"""\documentclass[%s]{%s}
\usepackage{array,booktabs,graphicx}
\begin{document}
Table~\ref{tab:t}. %s
\input{t.tex}
\end{document}
"""


def compiled(folder: Path, table: Table, kind: str = "standalone") -> str:
    """The log of a document that holds the table, set without any warning."""
    (folder / "t.tex").write_text(FORMATS["tex"](table), encoding="utf-8")
    name, _, option = kind.partition(",")
    paper = FORMATS["standalone.tex"](table) if kind == "standalone" else PAPER % (option, name, "A paper. " * 200)
    (folder / "d.tex").write_text(paper, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "d.tex"]
    for _ in ("once", "with its labels"):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="latin-1", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    for trouble in ("Warning", "Missing character", "Overfull"):
        assert trouble not in done.stdout, done.stdout[-2000:]
    return done.stdout


NEEDS_TEX = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX on this machine")


@NEEDS_TEX
def test_latex_compiles(tmp_path: Path) -> None:
    names = (HOSTILE, "[starts a row", "* too", "模型 † ‡")
    rows = tuple((Cell(name), Cell(1.5, 0.2, HOSTILE, "†‡¶")) for name in names)
    compiled(tmp_path, replace(table_of(*rows), notes=(HOSTILE, "A note.")))


@NEEDS_TEX
@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("columns", [2, 14])
@pytest.mark.parametrize("rows", [6, 51, 600])
def test_latex_tables_fit_their_pages(tmp_path: Path, rows: int, columns: int, kind: str) -> None:
    name = "model_with_a_long_name-{}/" + 3 * "averyverylongpart"
    cells = tuple((Cell(name.format(i // 9)), *(Cell(1000.5 + i, 9.5) for _ in range(columns))) for i in range(rows))
    heads = (Column("Model", text=True), *(Column(f"column {i}", f"Group {i // 4}") for i in range(columns)))
    notes = ("A note of some length about what is above it, " * 90, *20 * ("Another note, " * 9,))
    compiled(
        tmp_path, Table(name="t", title="T", caption="Caption. " * 40, columns=heads, rows=cells, notes=notes), kind
    )


@NEEDS_TEX
def test_a_caption_takes_room_on_its_page(tmp_path: Path) -> None:
    table = replace(table_of(*((Cell("a"), Cell(index)) for index in range(35))), caption="A caption. " * 150)
    compiled(tmp_path, table, "article")


@NEEDS_TEX
def test_the_letters_of_a_wide_table_can_be_read(tmp_path: Path) -> None:
    names = (Column("Model", text=True), Column("Method", text=True))
    heads = (*names, *(Column(f"{i} %", "wikitext2 @2048") for i in range(12)))
    cells = (Cell("smollm2-135m-q4"), Cell("tomoe (experts=8, learning_rate=None)"), *12 * [Cell(100.25, 2.5)])
    table = Table(name="t", title="T", caption="C.", columns=heads, rows=3 * (cells,))
    compiled(tmp_path, table, "article")
    (tmp_path / "d.tex").write_text(WIDTHS + (tmp_path / "d.tex").read_text())
    command = ["pdflatex", "-interaction=nonstopmode", "d.tex"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="latin-1", check=False).stdout
    widths = [float(width) for width in re.findall(r"natural width ([\d.]+)pt", log)]
    assert len(widths) > 1 and all(10 * 345 / width >= 6 for width in widths)


WIDTHS = r"""\AddToHook{begindocument}{\let\plain\tabular\let\endplain\endtabular
\renewenvironment{tabular}[1]{\setbox0\hbox\bgroup\plain{#1}}{%
\endplain\egroup\typeout{natural width \the\wd0}\box0}}
"""


def parts_of(text: str) -> list[str]:
    """The floats of a fragment."""
    return re.findall(r"\\begin\{table\*\}.*?\\end\{table\*\}", text, re.DOTALL)


def test_long_latex_tables_go_on_with_their_number_and_block() -> None:
    table = table_of(*((Cell("a"), Cell(index)) for index in range(100)))
    parts = parts_of(FORMATS["tex"](table))
    rows = [read_latex(part) for part in parts]
    assert [row[1] for part in rows for row in part] == [str(index) for index in range(100)]
    assert len(parts) > 2 and all(part[0][0] == "a" for part in rows)
    assert r"\caption{Title. Caption.}" in parts[0] and r"\label{tab:t}" in parts[0]
    for part in parts[1:]:
        assert r"\addtocounter{table}{-1}" in part and r"\caption{Title (continued)}" in part and "label" not in part


def test_notes_are_in_the_last_part_of_a_latex_table() -> None:
    table = replace(table_of(*((Cell("a"), Cell(index)) for index in range(40))), notes=("A note.", "word " * 1200))
    text = FORMATS["tex"](table)
    first, last, *more = parts_of(text)
    assert "note" not in first and "A note." in last and read_latex(last)[-1] == ["", "39"]
    assert len(more) == 2 and all("word" in part and "tabular" not in part for part in more)
    assert "".join(parts_of(text)).count("word") == text.count("word") == 1200


def test_wide_latex_tables_repeat_the_names(tmp_path: Path) -> None:
    table = replace(paper_tables(tmp_path)[0], notes=("A note.",))
    parts = parts_of(FORMATS["tex"](table))
    panels = list(map(read_latex, parts))
    assert len(panels) > 1 and all([row[:2] for row in panel] == [row[:2] for row in panels[0]] for panel in panels)
    joined = [[cell for part in rows for cell in part[2:]] for rows in zip(*panels, strict=True)]
    assert joined == [row[2:] for row in table.shown]
    assert ["A note." in part for part in parts] == [False] * (len(parts) - 1) + [True]


def test_wrapped_latex_rows_count_for_what_they_are() -> None:
    text = FORMATS["tex"](table_of(*((Cell(f"{index} " + "word " * 40), Cell(index)) for index in range(9))))
    assert len(parts_of(text)) == 5 and text.count(r"{>{\raggedright\arraybackslash}p{12em}r}") == 5


def test_a_narrow_terminal_gets_the_columns_below_each_other() -> None:
    columns = (Column("Model", text=True), Column("Method", text=True), *(Column(f"c{i}") for i in range(9)))
    row = (Cell("tiny"), Cell("a method with a very long name, set to something special"), *map(Cell, range(9)))
    text = terminal(Table(name="t", title="Title", caption="word " * 40, columns=columns, rows=(row,)), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert [int(digit) for digit in re.findall(r"  (\d)\b", text)] == list(range(9)) and text.count("a method with") > 1
    assert [number for number in re.findall(r"\bc(\d)\b", text)] == [str(i) for i in range(9)]


def test_a_shared_header_does_not_widen_its_columns() -> None:
    columns = (Column("Method", text=True), *(Column(f"c{i}", "Parameters, in millions") for i in range(3)))
    row = (Cell("tomoe"), *map(Cell, range(3)))
    text = terminal(Table(name="t", title="T", caption="C.", columns=columns, rows=(row,)), 60)
    assert text.count("tomoe") == 1 and text.count("Parameters,") == 3 and text.count("in millions") == 3
    assert max(map(len, text.splitlines())) <= 60
    long = replace(columns[1], group="g" * 50)
    text = terminal(Table(name="t", title="T", caption="C.", columns=(columns[0], long), rows=(row[:2],)), 60)
    assert max(map(len, text.splitlines())) <= 60


def test_the_best_has_a_star_in_a_terminal() -> None:
    text = terminal(table_of((Cell("a"), Cell(1.5, best=True)), (Cell("b"), Cell(2.5))), 80)
    assert "1.50*" in text and "2.50*" not in text and "* the best" in text
    assert "the best" not in terminal(table_of((Cell("a"), Cell(1.5))), 80)


@pytest.mark.parametrize("text", ["# x", "## x", "- x", "+ x", "12. x", "1) x", "-", "-1 x", "1.5 x", "#x", "a - b"])
def test_no_text_begins_a_heading_or_a_list(text: str) -> None:
    assert MarkdownIt().render(escape_markdown(text)) == f"<p>{text}</p>\n" or text == "-"
    assert (escape_markdown(text) == text) == (text in ("-", "-1 x", "1.5 x", "#x", "a - b"))
