"""A study in stages: fine-tuning, a reward model from pairs, PPO on its scores, and DPO on the same pairs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from verl.agents.collector import sampling_params
from verl.cli.quickstart import accuracy_of, quickstart_config, warm_up
from verl.config import load_run
from verl.config.run import PreferenceConfig, RewardModelConfig, TrainerConfig
from verl.data.tasks.answer_tasks import near_miss
from verl.data.tasks.table import TASKS
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.evaluation import answer_all
from verl.trainer.preference import PreferenceTrainer
from verl.trainer.reward_model import RewardModelTrainer
from verl.trainer.rl_trainer import Trainer

TASK = "sort-6"
CHARACTERS = "0123456789="
# Sampled accuracy up to which the model is fine-tuned on examples.
WARM_ACCURACY = 0.2
# Goals of every run: accuracy of the reward model on held-out pairs, and gain of PPO and of DPO on held-out
# prompts.
PAIR_ACCURACY, GAIN = 0.9, 0.2
# Answers of the fine-tuned model to each prompt, of which the wrong ones make pairs, and near misses.
OWN_SAMPLES, NEAR_MISSES = 6, 2
OPTIMIZER = "warmup_steps: 10, betas: [0.9, 0.95], schedule: cosine"
REWARD_MODEL = (f"policy.optimizer={{lr: 3e-3, {OPTIMIZER}}}", "loss.center_coef=0.01")
PREFERENCE = (f"policy.optimizer={{lr: 1e-3, {OPTIMIZER}}}", "loss={name: dpo, beta: 0.5}")
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Stage:
    """A part of the study and its measurements.

    Attributes:
        name: of the stage.
        steps: of training, 0 for none.
        cpu_s: CPU seconds, on one thread.
        figures: by name.
    """

    name: str
    steps: int
    cpu_s: float
    figures: dict[str, float]


class Study:
    """One run of the study in a folder."""

    def __init__(self, folder: Path, *, seed: int, reward_steps: int, ppo_steps: int, dpo_steps: int) -> None:
        self.folder, self.seed, self.reward_steps, self.dpo_steps = folder, seed, reward_steps, dpo_steps
        self.stages: list[Stage] = []
        self.curve: list[tuple[float, float]] = []
        self._mark = time.process_time()
        self._overrides = (
            f"data.train=task:{TASK}",
            f"data.test=task:{TASK}",
            f"sampling.max_tokens={TASKS[TASK].max_tokens}",
            f"steps={ppo_steps}",
            "tracking.sinks=[]",
        )

    def run(self) -> None:
        """Run all stages."""
        make_tiny_model(self.folder / "start", hidden=64, layers=3, seed=self.seed, characters=CHARACTERS)
        config = self._config()
        steps = warm_up(self.folder, config, QUIET, enough=WARM_ACCURACY)
        taught = Trainer(config, console=QUIET)
        before = accuracy_of(answer_all(taught.collector, taught.test_prompts, config))
        self._done("fine-tuning on examples", steps, {"accuracy": before})
        files = {"train": self._write_pairs(taught, "train"), "test": self._write_pairs(taught, "test")}
        self._done("sampling for pairs", 0, {"pairs": files["train"][1], "of own answers": files["train"][2]})
        pairs = [
            f"data.train={files['train'][0]}",
            f"data.test={files['test'][0]}",
            f"policy.path={self.folder / 'warm'}",
        ]
        common = [*pairs, "pairs_per_step=128", f"seed={self.seed}", "tracking.sinks=[]"]
        self._train_reward_model(common)
        self._train_on_scores()
        self._train_on_pairs(common)

    def _config(self, *functions: str) -> TrainerConfig:
        rewards = (f"rewards.functions=[{', '.join(functions)}]",) if functions else ()
        return quickstart_config(
            self.folder, seed=self.seed, algo="ppo", overrides=(*self._overrides, *rewards)
        )

    def _write_pairs(self, taught: Trainer, split: Literal["train", "test"]) -> tuple[Path, float, float]:
        """Write pairs of a split: the right answer, with wrong answers of the model and with near misses.

        The reference answer decides which answers are wrong.

        Returns:
            The file, the number of pairs, and the number of pairs with an answer of the model.
        """
        prompts, _ = taught.read_prompts(f"task:{TASK}", split)
        sampling = replace(sampling_params(taught.config, OWN_SAMPLES), temperature=1.0)
        groups = taught.collector.answer(
            prompts, [replace(sampling, seed=(1 << 61) + i) for i in range(len(prompts))]
        )
        rows: list[dict[str, Any]] = []
        num_own = 0
        for group in groups:
            prompt = group[0].prompt
            own = sorted({t.text for t in group if t.text and t.text != prompt.answer})
            near = [near_miss(prompt.answer, key=f"{prompt.content} {i}") for i in range(NEAR_MISSES)]
            rows += [
                {"prompt": prompt.content, "chosen": prompt.answer, "rejected": wrong}
                for wrong in (*own, *near)
            ]
            num_own += len(own)
        path = self.folder / f"pairs-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path, float(len(rows)), float(num_own)

    def _train_reward_model(self, common: list[str]) -> None:
        own = [f"output_dir={self.folder / 'judge'}", f"steps={self.reward_steps}"]
        trainer = RewardModelTrainer(
            load_run(RewardModelConfig, None, [*REWARD_MODEL, *common, *own]), console=QUIET
        )
        last = trainer.fit()[-1]
        measured = {name: last[f"eval/{name}"] for name in ("accuracy", "calibration_error", "brier_score")}
        self._done(
            "reward model on pairs",
            self.reward_steps,
            {f"pair {name}": value for name, value in measured.items()},
        )

    def _train_on_scores(self) -> None:
        # The true reward has weight 0: it is measured and not trained on.
        config = self._config(
            f"{{name: model, path: {self.folder / 'judge' / 'model'}}}", "{name: exact, weight: 0.0}"
        )
        trainer = Trainer(config, console=QUIET)
        first = trainer.evaluate()
        history = trainer.fit()
        last = trainer.evaluate()
        figures = {"accuracy before": first["eval/accuracy"], "accuracy": last["eval/accuracy"]}
        figures |= {"score before": first["eval/reward"], "score": last["eval/reward"]}
        self.curve = [(m["accuracy"], m["reward"]) for m in history]
        self._done("PPO on its scores", config.steps, figures)

    def _train_on_pairs(self, common: list[str]) -> None:
        own = [f"output_dir={self.folder / 'preferred'}", f"steps={self.dpo_steps}"]
        trainer = PreferenceTrainer(
            load_run(PreferenceConfig, None, [*PREFERENCE, *common, *own]), console=QUIET
        )
        last, config = trainer.fit()[-1], self._config()
        policy = Trainer(
            config, actor_model=trainer.policy_engine.model.transformer, codec=trainer.codec, console=QUIET
        )
        accuracy = accuracy_of(answer_all(policy.collector, policy.test_prompts, config))
        self._done(
            "DPO on the same pairs",
            self.dpo_steps,
            {"accuracy": accuracy, "pair accuracy": last["eval/accuracy"]},
        )

    def _done(self, name: str, steps: int, figures: dict[str, float]) -> None:
        now = time.process_time()
        self.stages.append(Stage(name, steps, now - self._mark, figures))
        self._mark = now
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{name:24} {steps:4} steps {self.stages[-1].cpu_s:5.0f} CPU s  {shown}", flush=True)


def table(stages: list[Stage]) -> str:
    """The stages in Markdown."""
    lines = ["| Stage | Steps | CPU s | Measured on held-out prompts or pairs |", "| --- | --- | --- | --- |"]
    for stage in stages:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in stage.figures.items())
        lines.append(f"| {stage.name} | {stage.steps or ''} | {stage.cpu_s:.0f} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    """Run the study; return 1 if the reward model or the policy stays below its goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward-steps", type=int, default=900, help="of the reward model (900)")
    parser.add_argument("--ppo-steps", type=int, default=60, help="of the policy (60)")
    parser.add_argument(
        "--dpo-steps", type=int, default=200, help="of the policy without a reward model (200)"
    )
    parser.add_argument("--output", type=Path, help="folder to keep models and pairs in")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    # One thread is faster than several for models this small.
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        steps = {
            "reward_steps": options.reward_steps,
            "ppo_steps": options.ppo_steps,
            "dpo_steps": options.dpo_steps,
        }
        study = Study(options.output or Path(place), seed=options.seed, **steps)
        study.run()
    print(f"\n{table(study.stages)}\n\nby PPO step, accuracy and score:")
    for step in range(0, len(study.curve), max(1, len(study.curve) // 10)):
        print(f"{step + 1:4}  {study.curve[step][0]:.3f}  {study.curve[step][1]:.2f}")
    if options.json:
        options.json.write_text(
            json.dumps({"stages": [asdict(s) for s in study.stages], "curve": study.curve}, indent=1)
        )
    before, judge = study.stages[0].figures["accuracy"], study.stages[2].figures["pair accuracy"]
    gained = min(stage.figures["accuracy"] for stage in study.stages[3:]) - before
    return int(judge < PAIR_ACCURACY or gained < GAIN)


if __name__ == "__main__":
    sys.exit(main())
