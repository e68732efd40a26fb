"""The commands that the quickstart prints, as a reader would type them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from verl.cli.main import main
from verl.cli.quickstart import command_name, next_steps
from verl.engines.hf.pretrained import make_tiny_model


def installed() -> Path:
    """The program of this environment."""
    return Path(sys.prefix) / "bin" / "verl"


def test_the_program_is_named_as_the_shell_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(installed())])
    monkeypatch.setenv("PATH", str(installed().parent))
    assert command_name() == "verl"
    monkeypatch.setenv("PATH", "/nowhere")
    assert command_name() == shlex.quote(str(installed()))
    other = tmp_path / "verl"  # another program of this name comes first
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{installed().parent}")
    assert command_name() == shlex.quote(str(installed()))


def test_the_printed_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(installed())])
    folder = tmp_path / "a folder"
    make_tiny_model(folder / "warm", hidden=32, layers=1, characters="0123456789+=")
    commands = [line.strip() for line in next_steps(folder, folder / "warm").splitlines()[2:]]
    assert len(commands) == 3
    last = subprocess.run(
        commands[2], shell=True, env={"PATH": "/bin:/usr/bin"}, capture_output=True, text=True
    )
    assert last.returncode == 0 and last.stdout.startswith("algorithm.")
    # The others as printed, but smaller.
    smaller = {
        "eval": ["evaluation.prompts=2"],
        "train": ["steps=1", "prompts_per_step=2", "evaluation.prompts=2"],
    }
    for command in commands[:2]:
        _, name, *settings = shlex.split(command)
        assert main([name, *settings, *smaller[name]]) == 0
    assert (folder / "dapo" / "model" / "config.json").exists()
    assert f"trained model: {folder / 'dapo' / 'model'}" in capsys.readouterr().out
