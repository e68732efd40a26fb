"""The page on the step names every file that a step runs through."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.training import toy_trainer

ROOT = Path(__file__).parents[2]


def files_of_a_step(trainer) -> set[str]:
    """The files under verl/ in which a function is called during one step."""
    seen: set[str] = set()

    def note(frame, event, argument):
        seen.add(frame.f_code.co_filename)

    trainer.load_train_data()
    sys.setprofile(note)
    try:
        trainer.step()
    finally:
        sys.setprofile(None)
    return {str(Path(f).relative_to(ROOT)) for f in seen if f.startswith(str(ROOT / "verl"))}


def test_the_page_on_the_step_leads_through_at_most_eleven_files_and_leaves_none_out(letters, tmp_path):
    page = (ROOT / "docs/step.md").read_text()
    table, rest = page.split("What these call", 1)
    path, leaves = (set(re.findall(r"`(verl/[\w/]+\.py)`", text)) for text in (table, rest))
    ran = files_of_a_step(toy_trainer("ppo", letters, tmp_path))
    assert len(path) <= 11
    assert path <= ran <= path | leaves
