"""Builders of small runs: every recipe at toy size, a file of prompts, rows with all that a loss reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.tiny import batch_of, random_prompts, tiny_policy
from verl.config import load_config
from verl.config.roles import OptimizerConfig, RoleConfig
from verl.config.run import TrainerConfig
from verl.data.batch import Batch
from verl.data.packing import BatchPlan
from verl.engines.local import LocalEngine
from verl.engines.minibatches import skip_zero_advantages, write_loss_weights
from verl.engines.roles.role_columns import policy_logprobs
from verl.engines.roles.role_worker import Learner
from verl.engines.roles.teacher import TeacherWorker
from verl.trainer.rl_trainer import Trainer

CHARACTERS = "abcdefgh="

# What makes a recipe small; nothing here changes the method.
_TOY = {
    "grpo": ["samples_per_prompt=4", "prompts_per_step=4"],
    "ppo": ["prompts_per_step=8", "critic.optimizer.lr=1e-3"],
    "dapo": [
        "samples_per_prompt=4",
        "prompts_per_step=4",
        "algorithm.minibatches=2",
        "algorithm.overlong_buffer_tokens=3",
    ],
}
# What a recipe needs from its user.
_NEEDS = {"gdpo": ["rewards.functions=[position_share, exact]"]}
_RUN = [
    "device=cpu",
    "sampling.max_tokens=9",
    "policy.optimizer.lr=1e-3",
    "policy.optimizer.warmup_steps=0",
    "tracking.sinks=[jsonl]",
]


def toy_config(recipe: str, model: Path, folder: Path, *overrides: str) -> TrainerConfig:
    """A recipe at toy size on the model, over 12 prompts to copy; `folder` takes the prompts and the run."""
    prompts = write_prompts(folder / "prompts.jsonl")
    paths = [f"policy.path={model}", f"data.train={prompts}", f"output_dir={folder / 'run'}"]
    if any(override.startswith("evaluation.") for override in overrides):
        paths.append(f"data.test={prompts}")
    needs = [f"teacher.path={model}"] if recipe == "distillation" else _NEEDS.get(recipe, [])
    sizes = _TOY.get(recipe) or _toy_sizes(recipe)
    return load_config(
        {"recipe": recipe, "steps": 3, "rewards": {"functions": ["position_share"]}},
        [*sizes, *_RUN, *paths, *needs, *overrides],
    )


def _toy_sizes(recipe: str) -> list[str]:
    """Few answers in groups of the recipe's kind, few updates, short answers."""
    config = load_config(recipe)
    samples = min(4, config.samples_per_prompt)
    sizes = [f"samples_per_prompt={samples}", f"prompts_per_step={8 if samples < 4 else 4}"]
    sizes.append(f"algorithm.minibatches={min(2, config.algorithm.minibatches)}")
    if config.algorithm.overlong_buffer_tokens:
        sizes.append("algorithm.overlong_buffer_tokens=3")
    if "length" in config.algorithm.aggregation.options:
        sizes.append("algorithm.aggregation.length=9")
    if config.critic.warmup_steps:
        sizes.append("critic.warmup_steps=0")
    return sizes


def toy_trainer(recipe: str, model: Path, folder: Path, *overrides: str, **given: Any) -> Trainer:
    """A trainer of `toy_config` that writes to no screen, ready to step."""
    trainer = Trainer(
        toy_config(recipe, model, folder, *overrides), console=Console(file=io.StringIO()), **given
    )
    trainer.load_train_data()
    return trainer


def write_prompts(path: Path, count: int = 12) -> Path:
    """A JSONL file of prompts such as "abc=" whose answer is "abc"."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [CHARACTERS[i % 8] + CHARACTERS[i // 8] + "c" for i in range(count)]
        path.write_text("".join(json.dumps({"prompt": f"{text}=", "answer": text}) + "\n" for text in texts))
    return path


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def local_engine(*, seed: int = 0, **settings: Any) -> LocalEngine:
    """An engine on a fresh tiny policy; `optimizer` is a mapping, without clipping unless it says so."""
    optimizer = OptimizerConfig(**{"lr": 1e-3, "max_grad_norm": 1e9, **settings.pop("optimizer", {})})
    config = RoleConfig(optimizer=optimizer, **settings)
    return LocalEngine(
        tiny_policy(precision=config.precision, seed=seed, initializer_range=0.05),
        config,
        device=torch.device("cpu"),
        total_updates=10,
    )


def rows_to_learn(*, with_padding: bool = False) -> Batch:
    """Six rows: row 1 has one token, row 2 tokens of the environment in its middle, row 4 is masked.

    With padding, some have it as an ordinary token, which a policy may sample; and the first token of a
    second half of the vocabulary.
    """
    prompts, responses = random_prompts([3, 1, 5, 2, 4, 2]), random_prompts([4, 1, 7, 3, 2, 5], seed=1)
    if with_padding:
        prompts[0][1], prompts[2][2], responses[0][1:3], responses[5][0] = 0, 50, [0, 50], 0
    batch = batch_of(prompts, responses)
    mask = batch["mask"]
    mask[2, 2:5] = False
    mask[4] = False
    batch.write("mask", mask)
    generator = torch.Generator().manual_seed(2)
    for name in ("advantages", "values", "returns"):
        batch.write(name, torch.randn(mask.shape, generator=generator))
    # Near the policy of `local_engine`: some ratios are clipped, none is beyond all reason.
    own = policy_logprobs(local_engine(), batch, one_update(list(range(6))), temperature=1.0, chunk=100)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        batch.write(name, own + 0.3 * torch.randn(mask.shape, generator=generator))
    batch.write("noise", torch.rand(mask.shape, generator=generator))
    batch.write("rewards", torch.tensor([1.0, 0.0, 0.5, 1.0, 0.5, 0.25]))
    batch.write("group_ids", torch.tensor([0, 1, 0, 1, 2, 2]))
    batch.update(
        TeacherWorker(local_engine(seed=1), temperature=1.0, chunk=100, top_k=5).write(
            batch, one_update(list(range(6)))
        )
    )
    return batch


def one_update(*micro_batches: list[int]) -> BatchPlan:
    """A plan of a single minibatch on one rank."""
    return BatchPlan([[list(micro_batches)]])


def engine_of(trainer: Trainer, role: str = "policy") -> LocalEngine:
    """The engine of a role in this process."""
    return getattr(trainer.groups, role).worker.engine


def learn(worker: Learner, batch: Batch, plan: BatchPlan, kl_coef: float = 0.0) -> dict[str, float]:
    """One step of a role, as the trainer has it made."""
    algorithm = worker._algorithm
    write_loss_weights(batch, plan, algorithm)
    plan, metrics = skip_zero_advantages(batch, plan) if algorithm.skip_zero_advantages else (plan, {})
    return worker.update(batch, plan, kl_coef) | metrics


def gradient(engine: LocalEngine) -> torch.Tensor:
    """All gradients of the last update, in one line."""
    return torch.cat([p.grad.flatten() for p in engine.model.parameters()])


def weights(engine: LocalEngine) -> torch.Tensor:
    """All parameters, in one line."""
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])
