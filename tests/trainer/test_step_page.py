"""A step runs through few files and calls, and the page on the step shows it and names every file."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from tests.step_trace import traced_figures, traced_step
from verl.trainer.rl_trainer import Trainer

ROOT = Path(__file__).parents[2]
# Figures of a traced step that still miss their goal, with the value that must not grow.
BASELINE = {
    "the same to sample, through tasks": 20,
    "files of a traced step": 82,
}
MAX_FILES_TO_READ = 14


def test_a_step_runs_through_few_files_and_calls(tmp_path):
    for figure in traced_figures(tmp_path):
        allowed = BASELINE.get(figure.name, figure.goal)
        assert allowed is None or figure.value <= allowed, f"{figure.name}: {', '.join(figure.places)}"


def test_the_page_names_every_file_of_a_step_and_leads_through_few(letters, tmp_path):
    page = (ROOT / "docs/step.md").read_text(encoding="utf-8")
    first, second = page.split("## The files to read")[1].split("## The other files")
    to_read, others = (re.findall(r"`verl/([\w/]+\.py)`", text) for text in (first, second))
    ran = set(traced_step(letters, tmp_path, "ppo").functions)
    assert len(to_read) <= MAX_FILES_TO_READ
    assert sorted(to_read + others) == sorted(ran)  # each once


def test_the_page_shows_the_step_as_it_is():
    page = (ROOT / "docs/step.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].splitlines()
    code = textwrap.dedent(inspect.getsource(Trainer.step)).splitlines()
    without = [line for line in code if not line.startswith("@") and '"""' not in line]
    assert shown == without
