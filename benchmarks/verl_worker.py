"""The side of this project: its own `fit()`, stopped before each step."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from stepping import Gate, Workload, share_of_vowels

from verl.config import load_config
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.trainer.base import Metrics
from verl.trainer.build.rollout_factory import pool_of
from verl.trainer.rl_trainer import Trainer


class GatedTrainer(Trainer):
    """Waits before each step; a step lasts from one wait to the next, with all work of `fit`."""

    gate: Gate

    def step(self) -> Metrics:
        """Wait, then make a step."""
        self.gate.wait()
        return super().step()


def main() -> None:
    """Train as requested, then report on the steps."""
    gate, work = Gate(), Workload.from_command_line()
    torch.set_num_threads(work.threads)
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
        "output_dir": work.output,
        "device": "cpu",
    }
    given = [*(f"{key}={value}" for key, value in settings.items()), *work.settings]
    trainer = GatedTrainer(load_config("grpo", given), reward_fn=share_of_vowels)
    pool = pool_of(trainer.rollout)
    # Only the servers that this run started have a process.
    gate.servers = (
        [replica.engine.pid for replica in pool.replicas if isinstance(replica.engine, EmbeddedServer)]
        if pool
        else []
    )
    gate.clocks |= {"server_cpu_s": lambda: sum(map(cpu_seconds, gate.servers))}
    trainer.gate = gate
    steps = trainer.fit()[: work.steps]
    gate.answer(
        {
            "versions": {name: version(name) for name in ("verl", "torch", "transformers")},
            "steps": [_measured(s) for s in steps],
        }
    )


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process, all its threads together."""
    # After the name, which may hold spaces, in brackets: user and system time are the 12th and 13th field.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _measured(metrics: Metrics) -> dict[str, Any]:
    return {
        "phases": {
            name.removeprefix("time/").removesuffix("_s"): s
            for name, s in metrics.items()
            if name.startswith("time/")
        },
        "answer_tokens": metrics["response_tokens"],
        "prompt_tokens": metrics["prompt_tokens"],
        "reward": metrics["reward"],
        "grad_norm": metrics["grad_norm"],
        "staleness": metrics.get("staleness/mean", 0.0),
    }


if __name__ == "__main__":
    main()
