"""Arguments of the commands: each explains itself, and a wrong command line shows the usage."""

from __future__ import annotations

import pytest

import verl
from verl.cli.main import COMMANDS, main


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
