"""The process of one cell, as the process executor starts it: the job comes in, events and the outcome go out.

    python -m benchmarks.child

Torch is imported late, so that the process ends with its parent from its first moment on.
"""

import json
import os
import sys
import threading

from benchmarks.job import Job
from benchmarks.progress import Tracker, sender


def main() -> int:
    """Run the job in the first line of the input; events and the outcome go to standard output, all else to the log."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from benchmarks import cell

    error = cell.run(job, Tracker(sender(events)))
    events.write(json.dumps({"error": error}) + "\n")
    events.flush()
    return 1 if error else 0


def _end_with_parent() -> None:
    """End this process once the executor's end of our standard input is gone, however the executor died."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
