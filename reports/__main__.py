"""Renders the records of a run as a report.

python -m reports --results results --out report
python -m reports --results results --out report --usd-per-hour 2.50
python -m reports tokens results/tiny-llama/tomoe/0.5 --layers 0 4 9
"""

import argparse
import math
import sys
from pathlib import Path

from reports import coloured
from reports.records import ReportError, read_all
from reports.render import files, write


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
    """Read, render, write; the exit status is 2 where the report cannot be made."""
    if sys.argv[1:2] == ["tokens"]:
        return coloured.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder that run_all.py --out wrote to")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and the tables")
    parser.add_argument("--usd-per-hour", type=price, metavar="PRICE", help="of the device: adds a table of costs")
    arguments = parser.parse_args()
    try:
        write(files(read_all(arguments.results), arguments.usd_per_hour), arguments.out)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"The report is in {arguments.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
