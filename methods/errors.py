"""The one error type of the suite that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one paragraph: what was asked, what is allowed, what to type next. The command line prints it
    without a traceback and exits with status 2.
    """


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that is not in a list, nearest names first."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{guess} Known: {', '.join(known) or 'none'}.{' ' * bool(hint)}{hint}")


def nothing_to_measure() -> UserError:
    """The error for an empty calibration text."""
    return UserError("the calibration text is empty: there is nothing to measure. Use another --calibration.")


def overflow() -> UserError:
    """The error for measurements that are no numbers: choosing by them would be choosing at random."""
    return UserError(
        "the model overflows on the calibration text, or its weights are not numbers, so that its parts cannot be "
        "compared. Use --dtype bfloat16 or float32, or mend the model."
    )
