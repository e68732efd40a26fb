"""Runs on mixtures, curricula, files on disk and streams: the same steps after a restart."""

from __future__ import annotations

import json

import pytest

from tests.training import toy_trainer
from verl.trainer.run.callbacks import Callback

LETTERS = "abcdefgh"


def source(folder, name, count=12):
    """A file of prompts to copy."""
    path = folder / f"{name}.jsonl"
    rows = [LETTERS[i % 8] + LETTERS[i // 8] for i in range(count)]
    path.write_text(
        "\n".join(
            json.dumps({"prompt": f"{row}=", "answer": row, "level": len(rows) - i})
            for i, row in enumerate(rows)
        )
    )
    return str(path)


class Recorder(Callback):
    """Prompts and rewards of each step."""

    def __init__(self):
        self.steps = []

    def on_step(self, trainer, metrics):
        seen = [(t.prompt.content, t.prompt.index, t.reward) for t in trainer.last]
        self.steps.append(
            (seen, {name: metrics[name] for name in metrics if name.startswith(("source/", "curr"))})
        )


def steps_of(recipe, letters, folder, *settings, steps):
    recorder = Recorder()
    trainer = toy_trainer(recipe, letters, folder, f"steps={steps}", *settings, callbacks=[recorder])
    trainer.fit()
    trainer.close()
    return recorder.steps


def data_of(kind, folder):
    a, b = source(folder, "a"), source(folder, "b", 30)
    return {
        "mixture": [f"data.train=[{{path: {a}, weight: 1}}, {{path: {b}, weight: 3}}]"],
        "pass_rate": [f"data.train={b}", "data.curriculum={name: pass_rate, untried: 0.5, retry: 0.4}"],
        "on_disk": [f"data.train={b}", "data.in_memory_mb=0"],
        "stream": [f"data.train={{path: {b}, streaming: true}}", "data.shuffle_buffer=5"],
        "mixed_stream": [
            f"data.train=[{{path: {a}, weight: 1}}, {{path: {b}, weight: 1, streaming: true}}]",
            "data.shuffle_buffer=5",
        ],
    }[kind]


@pytest.mark.parametrize("kind", ["mixture", "pass_rate", "on_disk", "stream", "mixed_stream"])
@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_a_resumed_run_goes_on_with_the_same_prompts_and_rewards(kind, recipe, letters, tmp_path):
    settings = [*data_of(kind, tmp_path), "pipeline.max_staleness=1", "algorithm.overlong_buffer_tokens=0"]
    whole = steps_of(recipe, letters, tmp_path / "whole", *settings, steps=6)
    before = steps_of(recipe, letters, tmp_path / "parts", *settings, steps=3)
    assert before + steps_of(recipe, letters, tmp_path / "parts", *settings, steps=6) == whole
