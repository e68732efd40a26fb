"""The programs of the founding documents run to their end, unchanged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import verl
from verl.engines.hf.pretrained import make_tiny_model

PROGRAMS = Path(__file__).parent / "programs"


def output_of(program: str, *given: str, cwd: Path) -> list[str]:
    """The lines that a program prints; it must end well."""
    paths = os.pathsep.join(
        [str(Path(verl.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAMS / program), *given]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_loop_of_the_case_study_prints_a_reward_for_each_step(tmp_path):
    make_tiny_model(tmp_path / "model", hidden=32, layers=1)
    *steps, last = output_of("trainer_loop.py", str(tmp_path / "model"), "2", cwd=tmp_path)
    rewards = [re.fullmatch(rf"Step {i}, reward: (0\.\d+)", line) for i, line in enumerate(steps)]
    assert len(rewards) == 2
    assert all(rewards)
    # A tenth of the printable characters are digits, and the policy has hardly moved.
    assert all(0.03 < float(reward[1]) < 0.3 for reward in rewards)
    assert last == f"{verl.__version__} DataCollector"


def test_the_installed_command_runs():
    command = Path(sys.executable).parent / "verl"
    result = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    assert verl.__version__ in result.stdout
