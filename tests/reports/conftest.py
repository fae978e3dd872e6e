"""What the tests of reports share."""

from contextlib import nullcontext

import pytest

from reports.figures.files import SUFFIXES


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn in test_figures.py, and elsewhere by the command only: it takes seconds."""
    names = "figures/{}.{}".format
    monkeypatch.setattr(
        "reports.render.drawing",
        lambda plots: nullcontext(lambda: {names(plot.name, suffix): "" for plot in plots for suffix in SUFFIXES}),
    )
