"""Renders the records of a run as a report.

python -m reports --results results --out report
"""

import argparse
import sys
from pathlib import Path

from reports.records import ReportError, read_all
from reports.render import files, write


def main() -> int:
    """Read, render, write; the exit status is 2 where the report cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder that run_all.py --out wrote to")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and the tables")
    arguments = parser.parse_args()
    try:
        write(files(read_all(arguments.results)), arguments.out)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"The report is in {arguments.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
