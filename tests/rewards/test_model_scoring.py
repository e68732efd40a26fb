"""A reward model as a reward function: the scores of the trainer, from a folder, and what is no reward model
is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.training import CHARACTERS
from verl.config.data import RewardsConfig, WeightedChoice
from verl.data.trajectory import Trajectory
from verl.engines.hf.models import RewardModel
from verl.engines.hf.pretrained import as_reward_model, load_language_model, make_tiny_model, save_model
from verl.rewards.functions import build_rewards
from verl.rewards.model_scoring import model
from verl.utils.sampling_types import Prompt

PROMPTS = ["abc=", "abc=", "h=", [{"role": "user", "content": "ab"}]]
COMPLETIONS = ["abc", "a", "hhhhh", [{"role": "assistant", "content": "ba"}]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved reward model with its tokenizer; its head is random, but it is there."""
    start, folder = tmp_path_factory.mktemp("models") / "start", tmp_path_factory.mktemp("models") / "judge"
    make_tiny_model(start, hidden=32, layers=1, characters=CHARACTERS)
    transformer = as_reward_model(load_language_model(str(start)))
    torch.nn.init.normal_(transformer.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(RewardModel(transformer, "fp32"), folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


def by_hand(folder: Path, texts: list[str]) -> list[float]:
    own, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    return [own(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


def test_scores_are_those_of_the_saved_model(folder):
    scores = model(PROMPTS, COMPLETIONS, path=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(PROMPTS[3], tokenize=False, add_generation_prompt=True)
    assert all(type(score) is float for score in scores)
    assert scores == pytest.approx(
        by_hand(folder, ["abc=abc<eos>", "abc=a<eos>", "h=hhhhh<eos>", f"{chat}ba<eos>"]), abs=1e-5
    )


def test_scores_do_not_depend_on_the_others_or_on_the_micro_batches(folder):
    together = model(PROMPTS, COMPLETIONS, path=str(folder))
    assert model(PROMPTS, COMPLETIONS, path=str(folder), micro_batch_tokens=1) == pytest.approx(
        together, abs=1e-5
    )
    assert [
        model([p], [c], path=str(folder))[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ] == pytest.approx(together, abs=1e-5)
    assert model(PROMPTS[::-1], COMPLETIONS[::-1], path=str(folder)) == pytest.approx(
        together[::-1], abs=1e-5
    )
    assert model(PROMPTS, COMPLETIONS, path=str(folder), precision="bf16") == pytest.approx(together, abs=0.2)
    assert model([], [], path=str(folder)) == []


def test_a_system_prompt_is_read_where_a_chat_has_none(folder):
    plain, told = (
        model(PROMPTS, COMPLETIONS, path=str(folder), system_prompt=text) for text in (None, "abc")
    )
    assert told[:3] == pytest.approx(plain[:3], abs=1e-5) and abs(plain[3] - told[3]) > 1e-3


def test_it_is_a_reward_function_by_name(folder):
    choice = WeightedChoice(name="model", weight=2.0, path=str(folder))
    functions = build_rewards(RewardsConfig(functions=(choice,)))
    trajectories = [
        Trajectory(Prompt(p), [4], [5, 1], [True] * 2, None, [0] * 2, i, text=t)
        for i, (p, t) in enumerate(zip(PROMPTS, "abc", strict=False))
    ]
    functions.score(trajectories)
    functions.close()
    expected = model(PROMPTS[:3], list("abc"), path=str(folder))
    assert [t.reward for t in trajectories] == pytest.approx([2 * score for score in expected])
    assert [t.scores["model"] for t in trajectories] == pytest.approx(expected)


def test_a_folder_without_a_trained_head_is_refused_with_the_remedy(tmp_path):
    make_tiny_model(tmp_path, hidden=32, layers=1)
    with pytest.raises(
        ValueError,
        match=r"have no head \(score.weight\), so its scores would be random; "
        "train one with `verl reward-model",
    ):
        model(["a"], ["b"], path=str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"need the folder of a reward model: \{name: model, path: FOLDER\}"),
        ({"path": "/nowhere"}, "cannot load a reward model from '/nowhere': there is no such folder"),
    ],
)
def test_a_path_without_a_model_is_an_error_that_names_it(given, message):
    with pytest.raises(ValueError, match=message):
        model(["a"], ["b"], **given)


def test_a_completion_without_a_text_is_an_error(folder):
    with pytest.raises(
        ValueError, match="need completions that are texts or end with a message's text, got list"
    ):
        model(["a"], [[]], path=str(folder))
