"""Games of three turns, learned from rewards: wrong masks, credit or order of turns would show."""

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
    StepResult,
    ToolResult,
)
from verl.config.loader import load_config, load_sft_config
from verl.data.trajectory import turn_ends
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer
from verl.utils.tool_calls.calls import ToolCall

# The digits that the environment says, one in each turn; the first is the prompt.
ROWS = [
    {"prompt": [{"role": "user", "content": digits[0]}], "answer": digits}
    for digits in ("037", "150", "264", "346", "472", "513", "621", "705")
]
NUMBERS = [{"prompt": [{"role": "user", "content": "?"}], "answer": number} for number in "01234567"]
QUIET = Console(quiet=True)
STEPS = 14


class Echo(EnvironmentSession):
    """Says a digit in each of three turns; a turn that repeats it earns 1."""

    steps = True

    def __init__(self, start: EpisodeStart) -> None:
        self.left = list(start.prompt.answer)

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return [ToolResult("", "unknown_tool") for _ in calls]

    async def step(self, message: Message) -> StepResult:
        reward = float(message["content"] == self.left.pop(0))
        return StepResult([{"role": "user", "content": self.left[0]}] if self.left else [], reward)


class Guess(EnvironmentSession):
    """Says whether the number is below or above a guess; three guesses, and 1 at the end if it was found."""

    steps = True

    def __init__(self, start: EpisodeStart) -> None:
        self.answer, self.left, self.found = start.prompt.answer, 3, False
        self.state = ""  # all that was said

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return [ToolResult("", "unknown_tool") for _ in calls]

    async def step(self, message: Message) -> StepResult:
        self.left, self.found = self.left - 1, message["content"] == self.answer
        told = "<" if self.answer < message["content"] else ">"
        self.state += message["content"] + told
        over = self.found or not self.left
        return StepResult([] if over else [{"role": "user", "content": told}])

    async def reward(self) -> float:
        return float(self.found)


class Games(Environments):
    """Sessions in this process, without one for each episode."""

    def __init__(self, game: type[Echo] | type[Guess]) -> None:
        self.game = game

    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        return self.game(start)


def echo_traces() -> list[dict]:
    """Games of a player who repeats the digit in half of the turns."""
    uniform, rows = random.Random("player").random, []
    for i in range(512):
        messages = []
        for digit in ROWS[i % 8]["answer"]:
            said = digit if uniform() < 0.5 else str(int(uniform() * 8))
            messages += [{"role": "user", "content": digit}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages})
    return rows


def guess_traces() -> list[dict]:
    """Games of a player who halves the range in three of five turns, and else guesses any number."""
    uniform, rows = random.Random("player").random, []
    for i in range(1024):
        answer, low, high = i % 8, 0, 7
        messages = [{"role": "user", "content": "?"}]
        for turn in range(3):
            said = (low + high) // 2 if uniform() < 0.6 else int(uniform() * 8)
            messages.append({"role": "assistant", "content": str(said)})
            if said == answer or turn == 2:
                break
            messages.append({"role": "user", "content": "<" if answer < said else ">"})
            low, high = (low, min(high, said - 1)) if answer < said else (max(low, said + 1), high)
        rows.append({"messages": messages})
    return rows


def taught(folder: Path, traces: list[dict]) -> Path:
    """A model that plays as the traces do."""
    make_tiny_model(folder / "start", hidden=32, layers=2, characters="01234567<>?ua:\n")
    settings = [f"policy.path={folder / 'start'}", "steps=60", "rows_per_step=64", "policy.optimizer.lr=1e-2"]
    output = [f"output_dir={folder / 'taught'}", "tracking.sinks=[]", "policy.optimizer.warmup_steps=5"]
    SFTTrainer(load_sft_config(None, [*settings, *output]), console=QUIET, train_dataset=traces).fit()
    return folder / "taught" / "model"


@pytest.fixture(scope="module")
def echo_player(tmp_path_factory) -> Path:
    return taught(tmp_path_factory.mktemp("echo"), echo_traces())


@pytest.fixture(scope="module")
def guess_player(tmp_path_factory) -> Path:
    return taught(tmp_path_factory.mktemp("guess"), guess_traces())


def trainer_of(game: type[Echo] | type[Guess], player: Path, folder: Path, *settings: str) -> Trainer:
    """A trainer that has loaded the rows of the game."""
    common = [
        f"policy.path={player}",
        "data.train=null",
        "data.test=null",
        f"output_dir={folder}",
        "agent.max_turns=3",
        "sampling.max_tokens=2",
        "prompts_per_step=8",
        "samples_per_prompt=16",
        f"steps={STEPS}",
        "policy.optimizer.lr=3e-3",
        "tracking.sinks=[]",
    ]
    rows = ROWS if game is Echo else NUMBERS
    trainer = Trainer(
        load_config("quickstart", [*common, *settings]),
        console=QUIET,
        train_dataset=rows,
        test_dataset=rows,
        environment=Games(game),
    )
    trainer.load_train_data()
    return trainer


@pytest.mark.parametrize("advantage", ["grpo_turns", "gigpo"])
def test_a_game_of_three_turns_is_learned_from_the_rewards_of_its_turns(echo_player, tmp_path, advantage):
    settings = [f"algorithm.advantage={advantage}", "algorithm.minibatches=1"]
    trainer = trainer_of(Echo, echo_player, tmp_path, *settings, "rewards.functions=[environment]")
    rewards = [trainer.step()["reward"] for _ in range(STEPS)]
    assert rewards[0] < 2.1 and sum(rewards[-3:]) / 3 > rewards[0] + 0.4, rewards
    for t in trainer.last:
        said = [m["content"] for m in t.episode.messages if m["role"] == "assistant"]
        pairs = zip(t.response_ids, t.response_mask, strict=True)
        given = trainer.codec.decode([token for token, own in pairs if not own])
        assert given == "".join(f"u:{digit}\na:" for digit in t.prompt.answer[1 : len(said)])
        assert t.turn_rewards == [float(a == b) for a, b in zip(said, t.prompt.answer, strict=False)]
        assert len(turn_ends(t)) == len(said) == 3 or t.truncated
    trainer.close()


@pytest.mark.parametrize("advantage", ["grpo", "gigpo"])
def test_a_number_is_found_by_what_earlier_turns_heard(guess_player, tmp_path, advantage):
    settings = [f"algorithm.advantage={advantage}", "algorithm.epochs=1", "policy.optimizer.warmup_steps=3"]
    trainer = trainer_of(Guess, guess_player, tmp_path, *settings, "algorithm.kl.where=off")
    rewards = [trainer.step()["reward"] for _ in range(STEPS)]
    # Three guesses without feedback find 3 numbers of 8, the best player 7.
    assert rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.7, rewards
    trainer.close()
