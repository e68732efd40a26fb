"""One side of vs_trl.py: this project's own `fit()`, stopped before each step until the next one is asked for."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from stepping import Gate, Workload, share_of_vowels

from verl.config import load_config
from verl.trainer.base import Metrics
from verl.trainer.ppo import Trainer


class GatedTrainer(Trainer):
    """Waits before each step; from one wait to the next is a step with all that `fit` does around it."""

    gate: Gate

    def step(self) -> Metrics:
        """See `Trainer.step`."""
        self.gate.wait()
        return super().step()


def main() -> None:
    """Trains as asked, then reports what the steps did."""
    torch.set_num_threads(1)
    gate, work = Gate(), Workload.from_command_line()
    settings = {
        "steps": work.steps + 1,
        "prompts_per_step": work.num_prompts,
        "samples_per_prompt": work.num_samples,
        "sampling.max_tokens": work.answer_tokens,
        "policy.path": work.model,
        "policy.optimizer.lr": work.lr,
        "algorithm.kl.where": "off",
        "data.train": work.prompts,
        "data.shuffle": "false",
        "tracking.sinks": "[]",
        "tracking.samples_every_steps": 0,
        "output_dir": f"{work.folder}/verl",
        "device": "cpu",
    }
    trainer = GatedTrainer(load_config("grpo", [f"{key}={value}" for key, value in settings.items()]), reward_fn=share_of_vowels)
    trainer.gate = gate
    steps = trainer.fit()[: work.steps]
    gate.answer({"versions": {name: version(name) for name in ("verl", "torch", "transformers")}, "steps": [_measured(s) for s in steps]})


def _measured(metrics: Metrics) -> dict[str, Any]:
    return {
        "phases": {name.removeprefix("time/").removesuffix("_s"): s for name, s in metrics.items() if name.startswith("time/")},
        "answer_tokens": metrics["response_tokens"],
        "prompt_tokens": metrics["prompt_tokens"],
        "reward": metrics["reward"],
        "grad_norm": metrics["grad_norm"],
    }


if __name__ == "__main__":
    main()
