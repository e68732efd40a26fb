"""Settings of a whole run, for each kind of training."""

from __future__ import annotations

from typing import Literal

from verl.config.agent import AgentConfig
from verl.config.algorithm import AlgorithmConfig
from verl.config.data import DataConfig, PairsDataConfig, RewardsConfig, SFTDataConfig
from verl.config.fields import Choice, PathText, Section, setting
from verl.config.pipeline import PipelineConfig
from verl.config.placement import HybridConfig, PlacementConfig
from verl.config.roles import CriticConfig, RoleConfig, TeacherConfig
from verl.config.rollout import RolloutConfig, SamplingConfig


class EvaluationConfig(Section):
    """Evaluation of the current policy on held-out prompts."""

    every_steps: int | None = setting(
        0,
        "Steps between evaluations on data.test; 0: only before the first and after the last; none: never.",
        unit="steps",
        ge=0,
    )
    at_start: bool = setting(True, "Also evaluate before the first step.")
    prompts: int | None = setting(
        None, "Prompts used, from the first one on; none: all.", unit="prompts", ge=1
    )
    samples: int = setting(1, "Answers per prompt, k of mean@k and pass@k.", unit="answers", ge=1)
    pass_at: tuple[int, ...] = setting(
        (), "k of pass@k and maj@k, at most `samples`; none: 2, 4, 8, ... and `samples`.", unit="answers"
    )
    greedy: bool = setting(False, "Also ask for the most likely answer to each prompt.")
    by: tuple[str, ...] = setting((), "Columns of data.test whose values get metrics of their own.")
    temperature: float = setting(1.0, "Sampling temperature of these answers.", ge=0)
    top_p: float | None = setting(None, "top_p of these answers; none: sampling.top_p.", gt=0, le=1)
    max_tokens: int | None = setting(
        None, "Longest of these answers; none: sampling.max_tokens.", unit="tokens", ge=1
    )
    repetition_penalty: float | None = setting(
        None, "Repetition penalty of these answers; none: sampling.repetition_penalty.", gt=0
    )


class CheckpointConfig(Section):
    """Checkpoints that a run can be resumed from."""

    every_steps: int = setting(0, "Steps between checkpoints; 0: only at the end.", unit="steps", ge=0)
    keep: int = setting(2, "Newest checkpoints kept.", unit="checkpoints", ge=1)
    resume: PathText = setting(
        "auto", "auto: from the newest complete checkpoint in output_dir; never; or a checkpoint's folder."
    )


class TrackingConfig(Section):
    """Destinations of metrics and sampled answers."""

    sinks: tuple[str, ...] = setting(
        ("console", "jsonl", "tensorboard"), "console, jsonl, tensorboard, wandb, mlflow."
    )
    project: str = setting("verl", "Project name for W&B and MLflow.")
    name: str | None = setting(
        None, "Name of the run for W&B, MLflow and TensorBoard; none: the name of output_dir."
    )
    group: str | None = setting(None, "Group of runs for W&B, MLflow and TensorBoard, such as all its seeds.")
    samples_every_steps: int = setting(
        10,
        "Steps between tables of sampled answers on disk, besides the first and last step; 0: never.",
        unit="steps",
        ge=0,
    )
    num_samples: int = setting(8, "Answers in such a table.", unit="answers", ge=1)
    episodes: bool = setting(
        False, "Write all episodes of several turns, one file for each step, as rows that fine-tuning reads."
    )


class RunConfig(Section):
    """Settings that every kind of run has."""

    seed: int = setting(0, "Seed of the data order, the sampling and new weights.", ge=0)
    output_dir: PathText = setting(
        "outputs/run", "Folder of metrics, samples, checkpoints and the trained model."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one.")
    steps: int = setting(100, "Steps of the run.", unit="steps", ge=1)
    epochs: float | None = setting(
        None,
        "Passes over the rows of data.train; if it is set, it decides `steps`, rounded up.",
        unit="epochs",
        gt=0,
    )
    policy: RoleConfig = setting(RoleConfig(), "The model that is trained to answer.")
    data: DataConfig = setting(DataConfig(), "Files and columns of the prompts.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "Checkpoints to resume from.")
    tracking: TrackingConfig = setting(TrackingConfig(), "Destinations of metrics and sampled answers.")


class SFTConfig(RunConfig):
    """A run of supervised fine-tuning."""

    data: SFTDataConfig = setting(SFTDataConfig(), "Files and columns of the examples.")
    rows_per_step: int = setting(64, "Examples of a step.", unit="examples", ge=1)
    evaluation: EvaluationConfig = setting(EvaluationConfig(), "Evaluation on held-out examples.")
    sampling: SamplingConfig = setting(SamplingConfig(), "Sampling parameters of the answers in samples.")


class PairsConfig(RunConfig):
    """A run on pairs of a better and a worse answer."""

    data: PairsDataConfig = setting(PairsDataConfig(), "Files and columns of the pairs.")
    pairs_per_step: int = setting(
        64, "Pairs of a step.", unit="pairs", source="DPO, 2305.18290, appendix B", ge=1
    )
    eval_every_steps: int = setting(
        0, "Steps between evaluations on data.test, as evaluation.every_steps.", unit="steps", ge=0
    )
    evaluation: EvaluationConfig = setting(EvaluationConfig(), "Evaluation on held-out pairs.")


class PreferenceConfig(PairsConfig):
    """A run that trains the policy on preferences directly."""

    loss: Choice = setting(
        Choice(name="dpo"), "Loss of a pair, `verl.algorithms.preference_losses`.", source="DPO, 2305.18290"
    )
    reference: PathText | None = setting(
        None, "Model of the reference policy; none: the policy as it was at the start."
    )
    sampling: SamplingConfig = setting(SamplingConfig(), "Sampling parameters of the answers in samples.")


class RewardModelConfig(PairsConfig):
    """A run that trains a model with a scalar head to score answers."""

    loss: Choice = setting(
        Choice(name="bradley_terry"),
        "Loss of a pair, `verl.algorithms.preference_losses`.",
        source="InstructGPT, 2203.02155",
    )


class TrainerConfig(RunConfig):
    """A run of reinforcement learning."""

    prompts_per_step: int = setting(32, "Prompts of a step.", unit="prompts", ge=1)
    samples_per_prompt: int = setting(
        8,
        "Answers per prompt, the size of a group.",
        unit="answers",
        source="GRPO takes 64, 2402.03300",
        ge=1,
    )
    algorithm: AlgorithmConfig = setting(AlgorithmConfig(), "The training algorithm.")
    critic: CriticConfig = setting(CriticConfig(), "The model that judges tokens.")
    reference: PathText | None = setting(
        None, "Model of the reference policy; none: the policy as it was at the start."
    )
    teacher: TeacherConfig = setting(TeacherConfig(), "The model to distil from.")
    sampling: SamplingConfig = setting(SamplingConfig(), "Sampling parameters of the answers.")
    rollout: RolloutConfig = setting(RolloutConfig(), "The engine that answers prompts.")
    rewards: RewardsConfig = setting(RewardsConfig(), "The reward of an answer.")
    agent: AgentConfig = setting(AgentConfig(), "Episodes of several turns.")
    pipeline: PipelineConfig = setting(PipelineConfig(), "Generation ahead of training.")
    evaluation: EvaluationConfig = setting(EvaluationConfig(), "Evaluation on held-out prompts.")
    placement: PlacementConfig = setting(PlacementConfig(), "The devices of each role.")
    hybrid_engine: HybridConfig = setting(
        HybridConfig(), "Resharding of the policy between training and generation."
    )
