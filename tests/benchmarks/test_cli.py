"""The command line does not grow by accident."""

import shlex

import pytest

import methods
import run_all
from benchmarks import cli

OPTIONS = """
    --help --models --ratios --methods --tasks --seeds --budget --ratio-basis --ratio-tolerance --calibration --set
    --recover --device --dtype --offline --out --checkpoints --executor --workers --plan --force --only-evaluate
    --fail-fast --list
"""


def test_the_options_are_these() -> None:
    """A new option is a decision: of the design first, of this list then."""
    known = [action.option_strings[-1] for action in cli.parser()._actions]
    assert known == OPTIONS.split()


def test_defaults_name_registered_methods_only() -> None:
    arguments = cli.parser().parse_args(["--models", "llama2-7b", "--ratios", "0.5"])
    assert arguments.methods[0] == "dense" and {"shortgpt", "slicegpt"} <= set(arguments.methods)
    assert all(name in cli.parser().format_help() for name in arguments.methods)
    assert arguments.tasks == ["ppl", "zeroshot", "speed"] and arguments.budget == "paper"


def test_all_means_every_registered_method() -> None:
    line = ["--models", "llama2-7b", "--ratios", "0.5", "--methods", "all"]
    from methods import names

    assert cli.request(cli.parser().parse_args(line), line).methods == tuple(names())
    line.append("dense")
    assert set(cli.request(cli.parser().parse_args(line), line).methods) == set(names())


def test_settings_are_split_by_method() -> None:
    assert cli.settings(["a.x=1", "b.y=p=q", "a.z="]) == {"a": {"x": "1", "z": ""}, "b": {"y": "p=q"}}


@pytest.mark.parametrize(("what", "name"), [("models", "tiny-llama"), ("methods", "slicegpt"), ("tasks", "zeroshot")])
def test_lists(what: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--list", what]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ([], ["--methods", *cli.parser().get_default("methods")]),
        (["--methods", "all"], ["--methods", *methods.names()]),
        (["--methods", "slicegpt"], []),
        (["--methods=slicegpt"], []),
    ],
)
def test_the_command_is_recorded_as_it_can_be_typed_with_its_methods(typed: list[str], named: list[str]) -> None:
    line = ["--models", "llama2-7b", "--ratios", "0.5", *typed, "--out", "a b"]
    request = cli.request(cli.parser().parse_args(line), line)
    assert shlex.split(request.command) == ["python", "run_all.py", *line, *named]
    again = shlex.split(request.command)[2:]
    assert cli.request(cli.parser().parse_args(again), again).methods == request.methods
