"""A game of three turns, learned from rewards of turns: wrong masks, credit or order of turns would show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from verl.agents.environments.session import (
    Environments,
    EnvironmentSession,
    EpisodeStart,
    Message,
    Reward,
    StepResult,
    ToolResult,
)
from verl.config.loader import load_config, load_sft_config
from verl.data.trajectory import turn_ends
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer
from verl.utils.tool_calls.calls import ToolCall

ROWS = [{"prompt": [{"role": "user", "content": "?"}], "answer": str(number)} for number in range(8)]
QUIET = Console(quiet=True)


def heard(guess: str, answer: str) -> str:
    """Higher or lower, in a letter."""
    return "h" if answer > guess else "l"


class Numbers(EnvironmentSession):
    """A number from 0 to 7 in three guesses; the turn that finds it earns 1."""

    steps = True

    def __init__(self, start: EpisodeStart) -> None:
        self.answer, self.low, self.high, self.left = start.prompt.answer, 0, 7, 3

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return [ToolResult("", "unknown_tool") for _ in calls]

    async def step(self, message: Message) -> StepResult:
        guess, self.left = message["content"], self.left - 1
        if guess == self.answer:
            return StepResult(reward=1.0)
        told = heard(guess, self.answer)
        if guess in set("01234567"):
            low, high = (int(guess) + 1, 7) if told == "h" else (0, int(guess) - 1)
            self.low, self.high = max(self.low, low), min(self.high, high)
        self.state = f"{self.low}-{self.high}-{self.left}"
        return StepResult([{"role": "user", "content": told}] if self.left else [])

    async def reward(self) -> Reward | None:
        return 0.0  # turns alone are rewarded


class Games(Environments):
    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        return Numbers(start)


def traces() -> list[dict]:
    """Games of a player who guesses at random and has seen nothing but the rules."""
    uniform, rows = random.Random("player").random, []
    for i in range(512):
        messages, answer = list(ROWS[i % 8]["prompt"]), ROWS[i % 8]["answer"]
        for turn in range(3):
            guess = str(int(uniform() * 8))
            messages.append({"role": "assistant", "content": guess})
            if guess == answer or turn == 2:
                break
            messages.append({"role": "user", "content": heard(guess, answer)})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def player(tmp_path_factory) -> Path:
    """A model that knows the form of the game, and guesses at random."""
    folder = tmp_path_factory.mktemp("player")
    make_tiny_model(folder / "start", hidden=32, layers=2, characters="01234567?hlua:\n")
    settings = [f"policy.path={folder / 'start'}", "steps=40", "rows_per_step=64", "policy.optimizer.lr=1e-2"]
    output = [f"output_dir={folder / 'taught'}", "tracking.sinks=[]", "policy.optimizer.warmup_steps=5"]
    SFTTrainer(load_sft_config(None, [*settings, *output]), console=QUIET, train_dataset=traces()).fit()
    return folder / "taught" / "model"


@pytest.mark.parametrize("advantage", ["grpo_turns", "gigpo"])
def test_a_game_of_three_turns_is_learned_from_the_rewards_of_its_turns(player, tmp_path, advantage):
    settings = [
        f"policy.path={player}",
        "data.train=null",
        "data.test=null",
        f"output_dir={tmp_path}",
        f"algorithm.advantage={advantage}",
        "rewards.functions=[environment]",
        "agent.max_turns=3",
        "sampling.max_tokens=2",
        "prompts_per_step=8",
        "samples_per_prompt=32",
        "steps=24",
        "policy.optimizer.lr=4e-3",
        "tracking.sinks=[]",
    ]
    trainer = Trainer(
        load_config("quickstart", settings),
        console=QUIET,
        train_dataset=ROWS,
        test_dataset=ROWS,
        environment=Games(),  # in this process, without one for each episode
    )
    trainer.load_train_data()
    rewards = [trainer.step()["reward"] for _ in range(24)]
    # Three guesses at random find 1 number in 3, and the best player finds 7 of 8.
    assert rewards[0] < 0.45 and sum(rewards[-4:]) / 4 > 0.65, rewards
    for t in trainer.last:
        learned = [token for token, own in zip(t.response_ids, t.response_mask, strict=True) if own]
        given = [token for token, own in zip(t.response_ids, t.response_mask, strict=True) if not own]
        assert set(trainer.codec.decode(learned)) <= set("01234567") and not set(
            trainer.codec.decode(given)
        ) & set("01234567")
        assert len(t.turn_rewards) == len(turn_ends(t)) and sum(t.turn_rewards[:-1]) == 0
        assert t.turn_rewards[-1] == t.reward
