"""Runs on mixtures, curricula, files on disk and streams: the same steps after a restart."""

from __future__ import annotations

import json

import datasets
import pytest

from tests.trainer.test_sft import sft
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


def steps_of(recipe, letters, folder, *settings, steps, **given):
    recorder = Recorder()
    trainer = toy_trainer(recipe, letters, folder, f"steps={steps}", *settings, callbacks=[recorder], **given)
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


def test_an_iterable_dataset_in_memory_is_trained_on_and_resumed(letters, tmp_path):
    rows = [{"prompt": f"{a}{b}=", "answer": a + b} for a in LETTERS for b in "abc"]

    def steps(name, count):
        data = datasets.Dataset.from_list(rows).to_iterable_dataset()
        settings = ["data.train=memory", "data.shuffle_buffer=7", "pipeline.max_staleness=1"]
        return steps_of("grpo", letters, tmp_path / name, *settings, steps=count, train_dataset=data)

    assert steps("parts", 4) + steps("parts", 9) == steps("whole", 9)  # in the second pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train={path: A, streaming: true}", "epochs=1"], "need steps, not epochs 1, for data.train"),
        (["data.test={path: A, weight: 2}"], "the weight of .*a.jsonl would be ignored"),
        (
            ["data.test={path: A, streaming: true}", "evaluation.every_steps=1"],
            "need all rows of .*data.test",
        ),
        (["data.curriculum={name: easy_to_hard, column: none}"], "need a number in the column 'none'"),
        (["data.sampling_key=level"], "need sampling parameters as an object in the column 'level'"),
        (["data.shuffle_buffer=5"], "data.shuffle_buffer .*would be ignored"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(settings, message, letters, tmp_path):
    path = source(tmp_path, "a")
    given = [f"data.train={path}", *(setting.replace("A", path) for setting in settings)]
    with pytest.raises(ValueError, match=message):
        toy_trainer("grpo", letters, tmp_path, *given)


def test_fine_tuning_mixes_sources_and_goes_from_easy_to_hard(letters, tmp_path):
    a, b = source(tmp_path, "a"), source(tmp_path, "b")
    trainer = sft(
        letters,
        tmp_path,
        f"data.train=[{{path: {a}, weight: 3}}, {{path: {b}, weight: 1}}]",
        "data.curriculum={name: easy_to_hard, column: level}",
        "steps=2",
    )
    trainer.fit()
    drawn = trainer.loader.state_dict()["drawn"]
    assert drawn == [6, 2]
    assert [p.columns["level"] for p in trainer.loader.take(4) if p.index < 12] == [7, 8, 9]
    for wrong, message in [
        (f"{{path: {a}, reward: exact}}", "the reward of the source .* would be ignored"),
        (f"{{path: {a}, streaming: true}}", "need all rows of .*a.jsonl for data.train"),
    ]:
        with pytest.raises(ValueError, match=message):
            sft(letters, tmp_path, f"data.train={wrong}")
    with pytest.raises(ValueError, match="data.curriculum.* would be ignored: no answers are sampled"):
        sft(letters, tmp_path, "data.curriculum=pass_rate")
