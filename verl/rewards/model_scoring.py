"""A reward model as a reward function: it is loaded with its own tokenizer, and scores texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from torch import Tensor

from verl.config.roles import RoleConfig
from verl.controller.dispatch import PLANNED, register
from verl.controller.worker_group import LocalPool, WorkerGroup
from verl.data.batch import Batch
from verl.data.examples import Answer, answer_row
from verl.data.packing import BatchPlan, balance
from verl.data.trajectory import Trajectory
from verl.engines.hf.models import Precision, RewardModel
from verl.engines.hf.pretrained import load_reward_model
from verl.engines.local import LocalForwardEngine
from verl.engines.minibatches import plan_rows
from verl.engines.roles.role_worker import RoleWorker
from verl.utils.device import pick_device
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

# The last token of a row, which a model does not read; any token would do.
_UNREAD = 0


def model(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    path: str | None = None,
    system_prompt: str | None = None,
    precision: Precision = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    micro_batch_tokens: int = 16_384,
) -> list[float]:
    """Scores of a trained reward model: its head at the last token of each answer, the end token.

    InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5. The model is loaded once, by `prepare` or at
    the first call.

    Args:
        prompts: B texts or lists of chat messages.
        completions: B texts, or lists that end with the assistant's message.
        path: folder or hub name of the reward model, with its tokenizer.
        system_prompt: put in front of chats without one, as in the training of the reward model.
        precision: arithmetic of the forward pass.
        device: auto, cpu or cuda; auto is a GPU if there is one.
        micro_batch_tokens: most tokens of a forward pass.

    Returns:
        One number per completion.

    Raises:
        ValueError: no path, or no trained reward model there, or a completion without a text.
    """
    return _scores(_scorer(path, system_prompt, precision, device), prompts, completions, micro_batch_tokens)


def prepare(
    *,
    path: str | None = None,
    system_prompt: str | None = None,
    precision: Precision = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    micro_batch_tokens: int = 16_384,
) -> None:
    """Load the reward model for later calls of `model` with the same options.

    Raises:
        ValueError: as `model`.
    """
    _scorer(path, system_prompt, precision, device)


def rows_to_score(
    prompts: Sequence[Prompt], answers: Sequence[Answer], *, codec: TextCodec, pad_id: int | None
) -> Batch:
    """Rows of answers, each closed with the end token and followed by one token that the model does not read.

    Args:
        prompts: B prompts.
        answers: B texts, or messages after the prompt.
        codec: tokenizer of the reward model.
        pad_id: padding token of the model's configuration. Transformers reads the score at the last token
            that is not padding. Where the end token is the padding token, as in some published models, the
            answer is left open, so that the score is the same.
    """
    trajectories = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        encoded = answer_row(codec, prompt, answer)
        ids = encoded.response_ids
        while ids and ids[-1] == pad_id:
            ids.pop()
        row = [*ids, _UNREAD]
        trajectories.append(
            Trajectory(prompt, encoded.prompt_ids, row, [True] * len(row), None, [0] * len(row), i)
        )
    return Batch.from_trajectories(trajectories)


def last_scores(scores: Tensor, lengths: Tensor) -> Tensor:
    """Score [B] at the last position of each row of scores [B, T], for lengths [B]."""
    return scores.gather(1, lengths.to(scores.device)[:, None] - 1).squeeze(1)


class RewardWorker(RoleWorker):
    """One rank of a reward model."""

    @register(PLANNED)
    def score(self, batch: Batch, plan: BatchPlan) -> Batch:
        """Scores [B] of a batch of `rows_to_score`, as the column `scores`."""
        reward_model = self.engine.model
        assert isinstance(reward_model, RewardModel)
        scores = self.engine.infer(batch, plan_rows(plan), reward_model.token_scores)
        return Batch({"scores": last_scores(scores, batch.response_lengths)})


@dataclass
class RewardScorer:
    """Reward model on a group of ranks, with its tokenizer; scores one batch at a time."""

    group: WorkerGroup
    codec: TextCodec
    pad_id: int | None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, group: WorkerGroup, path: str, system_prompt: str | None) -> RewardScorer:
        """Scorer of a started group, with the tokenizer from the folder of its model."""
        config = group.call(RoleWorker.model_config).result().get_text_config()
        codec = TextCodec.load(path, system_prompt=system_prompt)
        codec.check_rows(config.vocab_size)
        return cls(group, codec, config.pad_token_id)

    def scores(
        self, prompts: Sequence[Prompt], answers: Sequence[str], *, micro_batch_tokens: int
    ) -> list[float]:
        """Score of each answer."""
        rows = rows_to_score(prompts, answers, codec=self.codec, pad_id=self.pad_id)
        plan = balance(
            rows.num_tokens,
            num_ranks=self.group.layouts["train"].num_parts,
            micro_batch_tokens=micro_batch_tokens,
        )
        with self.lock:
            numbers: list[float] = self.group.call(RewardWorker.score, rows, plan).result()["scores"].tolist()
        return numbers


def reward_function_on(scorer: RewardScorer) -> Callable[..., list[float]]:
    """Reward function `model` for a reward model that runs on ranks of its own."""

    def model(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        path: str,
        system_prompt: str | None = None,
        precision: Precision = "fp32",
        micro_batch_tokens: int = 16_384,
    ) -> list[float]:
        return _scores(scorer, prompts, completions, micro_batch_tokens)

    return model


def _scores(
    scorer: RewardScorer, prompts: Sequence[Any], completions: Sequence[Any], micro_batch_tokens: int
) -> list[float]:
    if not prompts:
        return []
    return scorer.scores(
        [Prompt(prompt) for prompt in prompts],
        [_text(c) for c in completions],
        micro_batch_tokens=micro_batch_tokens,
    )


_LOADING = threading.Lock()


def _scorer(path: str | None, system_prompt: str | None, precision: Precision, device: str) -> RewardScorer:
    if not path:
        raise ValueError(
            "need the folder of a reward model: {name: model, path: FOLDER}; train one with "
            "`verl reward-model`"
        )
    with _LOADING:  # Two calls at once must not load it twice.
        return _loaded(path, system_prompt, precision, device)


@cache
def _loaded(path: str, system_prompt: str | None, precision: Precision, device: str) -> RewardScorer:
    transformer = load_reward_model(path, new_head=False).requires_grad_(False)
    reward_model = RewardModel(transformer, precision).to(pick_device(device))
    reward_model.check_forward()
    engine = LocalForwardEngine(reward_model, RoleConfig(precision=precision), device=reward_model.device)
    return RewardScorer.of(LocalPool().start("reward", RewardWorker, engine), path, system_prompt)


def _text(completion: Any) -> str:
    text = completion[-1].get("content") if isinstance(completion, list) and completion else completion
    if not isinstance(text, str):
        raise ValueError(
            f"need completions that are texts or end with a message's text, got {type(completion).__name__}"
        )
    return text
