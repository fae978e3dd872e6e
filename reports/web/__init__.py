"""The report as one web page, `index.html`, that needs nothing beside it and no network.

html = page(records, results, plots, files, gaps, unfinished)

board      the leaderboard: the tables' numbers and marks, a row per result
details    where each row's numbers come from
missing    what is not there, and the commands that make it
routes     example texts in the colours of their experts
pictures   the figures as data
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.coloured import COLOURS, INKS, PART, visible
from reports.comparison import basis
from reports.figures import Gap, Plot
from reports.records import MAKE_ONE, Records
from reports.results import Results
from reports.summary import cautions, facts
from reports.tables import Table
from reports.web.board import board
from reports.web.details import details
from reports.web.missing import undrawn, unmeasured
from reports.web.pictures import pictures
from reports.web.routes import classes, coloured, data

HERE = Path(__file__).parent
PAGE = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def page(
    records: Records,
    results: Results,
    plots: Sequence[Plot],
    files: Mapping[str, str | bytes],
    gaps: Sequence[Gap] = (),
    unfinished: Table | None = None,
) -> str:
    """The whole page.

    Args:
        results: the records, pooled.
        plots: the figures to show.
        files: those of the report, by name, with the figures as they were drawn.
        gaps: the figures that could not be made.
        unfinished: the table of what was not measured; None where everything was.
    """
    leaders, script = board(results, records), (HERE / "page.js").read_text(encoding="utf-8")
    texts, done = coloured(results), sum(record.status == "done" for record in records)
    return PAGE.get_template("page.html").render(
        problems=records.problems,
        facts=facts(results),
        cautions=list(cautions(results)),
        done=done,
        make_one="" if done else MAKE_ONE.format("results"),
        board=leaders,
        shares=" ".join(basis(results)),
        details=details(row.records for row in leaders.rows),
        pictures=pictures(plots, files),
        unfinished=unfinished,
        unmeasured=unmeasured(unfinished, asked=True),
        unasked=unmeasured(unfinished, asked=False),
        undrawn=undrawn(gaps),
        models=texts,
        routes=data(texts),
        classes=classes,
        visible=visible,
        part=PART,
        colours=list(zip(COLOURS, INKS, strict=True)),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
