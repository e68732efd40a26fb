"""The side of TRL, in an environment of its own: the loop of GRPOTrainer, stopped after each step."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from datasets import load_dataset
from stepping import Gate, Workload, share_of_vowels
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class GateCallback(TrainerCallback):
    """Waits at the end of each step; a step lasts from one wait to the next, with all work of the loop."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait before the first step."""
        self.gate.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the next step."""
        control.should_training_stop |= not self.gate.wait()


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that records the seconds of generation and TRL's own metrics of all steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.generate_s: list[float] = []
        self.noted: dict[str, list[float]] = {}
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.perf_counter()
        generated = super()._generate(prompts)
        self.generate_s.append(time.perf_counter() - start)
        return generated

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the values of each step: with logging off this is called once, at the end, and drops them."""
        self.noted = {name: list(values) for name, values in self._metrics["train"].items()}
        super().log(logs, start_time)


def main() -> None:
    """Train as requested, then report on the steps."""
    gate, work = Gate(), Workload.from_command_line()
    torch.set_num_threads(work.threads)
    args = GRPOConfig(
        output_dir=str(work.output),
        max_steps=work.steps + 1,
        per_device_train_batch_size=work.num_prompts * work.num_samples,
        num_generations=work.num_samples,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        max_completion_length=work.answer_tokens,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        # TRL's defaults, bf16 and recomputed activations, save GPU memory.
        bf16=work.trl_bf16,
        gradient_checkpointing=work.trl_checkpointing,
        use_cpu=True,
        disable_dropout=True,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    prompts = load_dataset(
        "json", data_files=str(work.prompts), split="train", cache_dir=f"{work.folder}/datasets"
    )
    trainer = TimedTrainer(
        model=str(work.model),
        args=args,
        reward_funcs=share_of_vowels,
        train_dataset=prompts,
        callbacks=[GateCallback(gate)],
    )
    trainer.train()
    columns = zip(
        trainer.generate_s, trainer.noted["completions/mean_length"], trainer.noted["reward"], strict=True
    )
    steps = [
        {"phases": {"generate": s}, "answer_tokens": tokens, "reward": reward}
        for s, tokens, reward in columns
    ]
    names = ("trl", "torch", "transformers", "accelerate")
    gate.answer({"versions": {name: version(name) for name in names}, "steps": steps})


if __name__ == "__main__":
    main()
