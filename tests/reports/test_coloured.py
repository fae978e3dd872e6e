"""Tokens in their experts' colours: what is read, what a terminal shows, and whether it can be read."""

import contextlib
import doctest
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from reports import coloured
from reports.beside import read_routes
from tests.reports import factory, routed


def _folder(tmp_path: Path, content: dict[str, Any]) -> Path:
    factory.write(tmp_path, [factory.record("tiny-llama", "tomoe", 0.5)])
    (record,) = tmp_path.rglob("record.json")
    routed.write(record, content)
    return record


def _shown(record: Path, layers: list[int], **options: Any) -> str:
    stream = io.StringIO()
    routes, _ = read_routes(record)
    assert routes
    coloured.show(routes, layers, Console(file=stream, width=200, **options))
    return stream.getvalue()


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(coloured).failed == 0


def test_without_colours_experts_are_numbers(tmp_path: Path) -> None:
    lines = _shown(_folder(tmp_path, routed.routes()), [2]).splitlines()
    assert lines[0] == "encyclopaedic, layer 2 experts  0   1   2   3 "
    assert lines[1:3] == ["The₂ El₃be₀ <b>₁◌₂模₃⏎₀", "␣␣␣␣₁x�[31m₂"]
    assert sum("layer" in line for line in lines) == 2  # one per text


def test_with_colours_each_token_has_that_of_its_expert(tmp_path: Path) -> None:
    text = _shown(_folder(tmp_path, routed.routes()), [0], force_terminal=True, color_system="truecolor")
    red, green, blue = (int(coloured.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    assert f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m El\x1b[0m" in text
    assert "₁" not in text and "\x1b[31m" not in text


def test_more_experts_than_colours_are_numbered(tmp_path: Path) -> None:
    text = _shown(_folder(tmp_path, routed.routes(experts=9)), [5], force_terminal=True, color_system="truecolor")
    assert " El₆" in text


@pytest.mark.parametrize(
    ("environment", "numbered"),
    [
        ({"TERM": "xterm"}, True),  # with 16 colours, of which two experts share one
        ({"TERM": "xterm-256color"}, False),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, True),
    ],
)
def test_experts_can_be_told_apart_on_every_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], numbered: bool
) -> None:
    record = _folder(tmp_path, routed.routes())
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    reader, writer = os.openpty()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert coloured.main([str(record), "--layers", "0"]) == 0
    shown = b""
    with os.fdopen(reader, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # which is how a terminal ends
        while part := screen.read(2**16):
            shown += part
    text = shown.decode()
    assert " El" in text and (" El₁" in text) == numbered


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path, routed.routes())
    assert coloured.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"code, layer {layer} " in out for layer in (0, 2, 5))
    assert coloured.main([str(tmp_path), "--layers", "2"]) == 0
    assert "layer 0" not in capsys.readouterr().out


def test_layers_are_looked_for_everywhere_before_anything_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _folder(tmp_path / "a", routed.routes(layers=(1, 2)))
    lacking = _folder(tmp_path / "b", routed.routes()).parent
    assert coloured.main([str(tmp_path), "--layers", "1", "2"]) == 2
    out, err = capsys.readouterr()
    told = f"--layers 1: no such layer has experts in {lacking}. Those that have: 0, 2, 5.\n"
    assert (out, err) == ("", told)


def test_what_an_encoding_lacks_is_replaced(tmp_path: Path) -> None:
    record = _folder(tmp_path, routed.routes())
    command = [sys.executable, "-m", "reports", "tokens", str(record), "--layers", "0"]
    run = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert b" El?be?" in run.stdout


def test_without_routes_the_command_says_what_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory.write(tmp_path, [factory.record()])
    assert coloured.main([str(tmp_path)]) == 2
    assert "run_all.py --models tiny-llama --methods tomoe" in capsys.readouterr().err
    (record,) = tmp_path.rglob("record.json")
    assert coloured.main([str(record)]) == 2
    err = capsys.readouterr().err
    assert f"beside {record}: only" in err and err.endswith(f" --out {record.parent}\n")


def test_a_damaged_file_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    _folder(good, routed.routes())
    damaged = _folder(bad, routed.routes()).with_name("routes.json")
    damaged.write_text("{")
    assert coloured.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "code, layer 2 " in out and err.startswith(f"{damaged.as_posix()} is damaged")
    assert coloured.main([str(bad)]) == 2
    assert f"{damaged.as_posix()} is damaged" in (told := capsys.readouterr().err) and "run_all.py --models" in told


def test_no_such_folder_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert coloured.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"There is no {tmp_path / 'none'}. Give the folder")
    assert coloured.main([str(tmp_path / "a b")]) == 2
    assert capsys.readouterr().err.endswith(f" --out '{tmp_path / 'a b'}'\n")


@given(st.text())
def test_what_is_shown_has_no_control_characters_and_is_never_empty(token: str) -> None:
    shown, breaks = coloured.visible(token)
    assert shown.strip(" ") and shown.isprintable() and len(breaks) == token.count("\n")


def _luminance(colour: str) -> float:
    shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_tokens_are_readable_on_every_colour() -> None:
    for colour, ink in zip(coloured.COLOURS, coloured.INKS, strict=True):
        low, high = sorted([_luminance(colour), _luminance(ink)])
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2, level AA
    assert len(set(coloured.COLOURS)) == 8 and all(a != b for a, b in itertools.combinations(coloured.COLOURS, 2))
