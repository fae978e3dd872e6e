"""The report as one web page, `index.html`, that needs nothing beside it and no network.

html = page(records, results, plots, files)

board      the leaderboard: the tables' numbers and marks, a row per result
details    where each row's numbers come from
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
from reports.figures import Plot
from reports.records import Records
from reports.results import Results
from reports.summary import cautions, facts
from reports.web.board import FIXED, board
from reports.web.details import details
from reports.web.pictures import pictures
from reports.web.routes import classes, coloured, data

HERE = Path(__file__).parent
PAGE = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def page(records: Records, results: Results, plots: Sequence[Plot], files: Mapping[str, str | bytes]) -> str:
    """The whole page.

    Args:
        results: the records, pooled.
        plots: the figures to show.
        files: those of the report, by name, with the figures as they were drawn.
    """
    leaders, script = board(results, records), (HERE / "page.js").read_text(encoding="utf-8")
    texts = coloured(results)
    return PAGE.get_template("page.html").render(
        problems=records.problems,
        facts=facts(results),
        cautions=list(cautions(results)),
        done=sum(record.status == "done" for record in records),
        board=leaders,
        fixed=FIXED,
        details=details(row.records for row in leaders.rows),
        pictures=pictures(plots, files),
        models=texts,
        routes=data(texts),
        classes=classes,
        visible=visible,
        part=PART,
        colours=list(zip(COLOURS, INKS, strict=True)),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
