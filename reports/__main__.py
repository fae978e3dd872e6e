"""Renders the records of a run as a report, or prints some of its tables.

python -m reports --results results --out report
python -m reports --results results --out report --usd-per-hour 2.50
python -m reports tokens results/tiny-llama/tomoe/0.5 --layers 0 4 9
python -m reports --results results --show perplexity size
python -m reports compare results out/results       # what got better and what worse, see its --help
"""

import argparse
import io
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from reports import coloured, compare
from reports.records import Records, ReportError, read_all
from reports.render import TABLES, build, files, is_ours
from reports.results import pool
from reports.terminal import terminal
from reports.write import write


def price(text: str) -> float:
    """US dollars, more than none.

    Raises:
        argparse.ArgumentTypeError: it is no such number.
    """
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no price: give a number above 0, for example 2.50")
    return amount


def main() -> int:
    """The report or what else is asked; the exit status is 2 where it cannot be made."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals have no ±
    first, *others = sys.argv[1:] or [""]
    if first == "tokens":
        return coloured.main(others)
    try:
        return compare.main(others) if first == "compare" else report(sys.argv[1:])
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2


def report(arguments: Sequence[str]) -> int:
    """Read, render, and write or print.

    Raises:
        ReportError: it cannot be made.
    """
    parser = argparse.ArgumentParser(
        prog="python -m reports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="folder that run_all.py --out wrote to")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for report.md and the tables")
    what.add_argument("--show", nargs="+", choices=TABLES, metavar="TABLE", help=f"print: {', '.join(TABLES)}")
    parser.add_argument("--usd-per-hour", type=price, metavar="PRICE", help="of the device: adds a table of costs")
    options = parser.parse_args(arguments)
    records = read_all(options.results)
    if options.show:
        show(records, options.show, options.usd_per_hour)
    else:
        write(files(records, options.usd_per_hour), options.out, stale=is_ours)
        print(f"The report is in {options.out / 'report.md'}")
    return 0


def show(records: Records, names: Sequence[str], usd_per_hour: float | None) -> None:
    """Print tables as wide as the terminal; problems go to the standard error.

    Raises:
        ReportError: the records do not fill one of them.
    """
    tables = {table.name: table for table in build(records, pool(records), usd_per_hour)}
    for problem in records.problems:
        print(problem, file=sys.stderr)
    if empty := [name for name in names if name not in tables]:
        told = f"These records fill: {', '.join(tables)}." if tables else "There are no records."
        price = " The table cost needs --usd-per-hour." if "cost" in empty else ""
        raise ReportError(f"There is nothing to show for --show {' '.join(empty)}. {told}{price}")
    print(*(terminal(tables[name], shutil.get_terminal_size().columns) for name in names), sep="\n", end="")


if __name__ == "__main__":
    sys.exit(main())
