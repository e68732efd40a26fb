"""Arguments of the commands: each explains itself, and a wrong command line shows the usage."""

from __future__ import annotations

import pytest

import verl
from verl.cli.main import COMMANDS, main
from verl.cli.parser import parse_arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: verl {command}" in capsys.readouterr().out


def test_help_names_every_command_and_version_the_version(capsys):
    for option, words in (("--help", COMMANDS), ("--version", [f"verl {verl.__version__}"])):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize(
    "given", [[], ["trian", "grpo"], ["train"], ["train", "grpo", "--dryrun"], ["make-model"]]
)
def test_a_command_line_that_is_none_ends_with_2(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert "usage: verl" in capsys.readouterr().err


def test_settings_stand_before_and_behind_options():
    args = parse_arguments(["train", "grpo", "seed=1", "--dry-run", "steps=2", "data.shuffle=false"])
    assert args.overrides == ["seed=1", "steps=2", "data.shuffle=false"]
    with pytest.raises(SystemExit):
        parse_arguments(["serve", "model", "--port", "8001", "steps=2"])
