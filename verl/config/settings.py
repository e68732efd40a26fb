"""Every setting, typed and bounded; what must hold between them is in `verl.config.checks`, loading them
`verl.config`'s work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def setting(default: Any, meaning: str, *, unit: str = "", source: str = "", **bounds: Any) -> Any:
    """A pydantic field that also carries its unit, its bounds as text and the source of its default, for
    `verl config`.
    """
    extra: dict[str, Any] = {
        "unit": unit,
        "source": source,
        "bounds": " and ".join(f"{_SIGNS[sign]} {bound}" for sign, bound in bounds.items()),
    }
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """A group of settings: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(BaseModel):
    """One function of a table by name (or as "package.module:function") with options, `{name: gae, lam:
    0.95}`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments for the chosen function."""
        return dict(self.model_extra or {})


class Options(BaseModel):
    """Options of somebody else's program, passed on as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def values(self) -> dict[str, Any]:
        """Name -> value."""
        return dict(self.model_extra or {})


class WeightedChoice(Choice):
    """A reward function with its weight in the sum."""

    weight: float = 1.0


class KLSchedule(Section):
    """A coefficient that moves linearly with the step."""

    start: float = setting(0.01, "Coefficient at the first step.", ge=0)
    end: float = setting(0.1, "Coefficient from the last step on.", ge=0)
    steps: int = setting(1000, "Steps from start to end.", unit="steps", ge=1)


class KLAdaptive(Section):
    """A coefficient that is steered towards a target KL (https://arxiv.org/abs/1909.08593, section 2.2)."""

    initial: float = setting(0.001, "Coefficient at the first step.", gt=0)
    target: float = setting(0.1, "Wanted KL per token.", unit="nats", source="verl", gt=0)
    horizon: int = setting(
        10_000, "Trajectories over which a unit error is corrected.", unit="trajectories", ge=1
    )


def _kind_of_coef(value: Any) -> str:
    """Which of the three forms of a KL coefficient is meant, so that an error is told about that one alone."""
    if isinstance(value, KLAdaptive) or (
        isinstance(value, dict) and value.keys() & KLAdaptive.model_fields.keys()
    ):
        return "adaptive"
    return "schedule" if isinstance(value, dict | KLSchedule) else "number"


NumberCoef = Annotated[float, Field(ge=0), Tag("number")]
Coef = Annotated[
    NumberCoef | Annotated[KLSchedule, Tag("schedule")] | Annotated[KLAdaptive, Tag("adaptive")],
    Discriminator(_kind_of_coef),
]


class KLConfig(Section):
    """Distance to the reference policy."""

    where: Literal["off", "loss", "reward"] = setting(
        "off", "Add it to the loss, subtract it from the reward, or neither.", source="DAPO, 2503.14476, 2.3"
    )
    estimator: Choice = setting(
        Choice(name="k3"), "Estimator of the KL per token: k1, k2, k3.", source="GRPO, 2402.03300, 4.1.1"
    )
    coef: Coef = setting(
        0.001, "Coefficient: a number, {start, end, steps} or {initial, target, horizon}.", source="verl"
    )


class AlgorithmConfig(Section):
    """Five independent choices (advantage, policy loss, aggregation, KL, correction) and what belongs to
    them.
    """

    advantage: Choice = setting(
        Choice(name="grpo"), "Credit of each token, `verl.algorithms.advantages`.", source="GRPO, 2402.03300"
    )
    policy_loss: Choice = setting(
        Choice(name="ppo_clip"), "Loss per token, `verl.algorithms.losses`.", source="PPO, 1707.06347"
    )
    aggregation: Choice = setting(
        Choice(name="token_mean"),
        "Weight of each token in the loss, `verl.algorithms.aggregations`.",
        source="DAPO, 2503.14476, 3.3",
    )
    kl: KLConfig = setting(KLConfig(), "Distance to the reference policy.")
    correction: Choice = setting(
        Choice(name="bypass"),
        "Difference of sampler and trainer, `verl.algorithms.correction`.",
        source="HybridFlow, 2409.19256, table 4",
    )
    value_loss: Choice = setting(
        Choice(name="value_clip"),
        "Loss of the critic per token, `verl.algorithms.value_losses`.",
        source="PPO, 1707.06347",
    )
    entropy_coef: float = setting(
        0.0, "Weight of the entropy bonus in the policy loss.", source="DAPO, 2503.14476"
    )
    epochs: int = setting(1, "Passes over the trajectories of a step.", unit="passes", ge=1)
    minibatches: int = setting(
        1, "Optimizer updates per pass; the trajectories are split evenly.", unit="updates", ge=1
    )
    dynamic_sampling: bool = setting(
        False,
        "Replace groups whose rewards, for gdpo each part of them, are all equal by fresh prompts.",
        source="DAPO, 2503.14476, 3.2",
    )
    max_resamples: int = setting(
        10,
        "Fresh draws per step before dynamic sampling goes on with what it has.",
        unit="draws",
        source="verl",
        ge=1,
    )
    overlong_buffer_tokens: int = setting(
        0,
        "Answers that enter the last so many tokens lose reward linearly; 0: off.",
        unit="tokens",
        source="DAPO, 2503.14476, 3.4",
        ge=0,
    )
    overlong_penalty: float = setting(
        1.0, "Reward lost at the full length.", unit="reward", source="DAPO, 2503.14476, 3.4", ge=0
    )
    mask_truncated: bool = setting(
        False, "Leave answers cut at the length limit out of the loss.", source="DAPO, 2503.14476, 3.4"
    )
    length_penalty: Choice = setting(
        Choice(name="off"),
        "What the length of an answer among its siblings adds to its reward, `verl.rewards.shaping`.",
    )
    likelihood_coef: float = setting(
        0.0,
        "Weight of the likelihood of answers with a reward above 0 in the policy loss.",
        source="VAPO, 2504.05118, 4.3",
        ge=0,
    )
    skip_zero_advantages: bool = setting(
        False,
        "Leave rows whose advantages are all 0 out of forward and backward; they still count in every denominator.",
        source="2510.13786",
    )


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    name: Literal["adamw"] = setting("adamw", "Optimizer.")
    lr: float = setting(1e-6, "Peak learning rate.", source="GRPO, 2402.03300, 4.2", gt=0)
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Decay of the first and second moment.", source="Adam, 1412.6980"
    )
    eps: float = setting(1e-8, "Added to the root of the second moment.", source="Adam, 1412.6980", gt=0)
    weight_decay: float = setting(0.0, "Decoupled decay of matrices; vectors are not decayed.", ge=0)
    max_grad_norm: float = setting(
        1.0, "Global gradient norm above which gradients are scaled down.", source="verl", gt=0
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "Learning rate after the warm-up."
    )
    warmup_steps: int = setting(0, "Optimizer updates from 0 to the peak rate.", unit="updates", ge=0)
    min_lr_ratio: float = setting(
        0.0, "Learning rate at the end of a linear or cosine schedule, as a share of the peak.", ge=0, le=1
    )

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"need two numbers in [0, 1), got {list(betas)}")
        return betas


class LoraConfig(Section):
    """Train low-rank additions to the matrices instead of the weights themselves."""

    rank: int = setting(0, "Rank of the additions; 0: train all weights.", source="LoRA, 2106.09685", ge=0)
    alpha: float = setting(32.0, "The additions are scaled by alpha / rank.", source="LoRA, 2106.09685", gt=0)
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Names of the matrices that get one.",
    )


class RoleConfig(Section):
    """A trained model: its weights, its memory, its optimizer."""

    path: str | None = setting(None, "Folder or hub name of a Hugging Face causal language model.")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "Arithmetic of forward and backward; weights and optimizer stay fp32."
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, a third more arithmetic.",
        source="1604.06174",
    )
    packing: bool = setting(
        True, "Forward rows back to back without padding; off: padded to the longest row."
    )
    micro_batch_tokens: int = setting(
        16_384, "Most tokens of one forward and backward pass.", unit="tokens", ge=1
    )
    micro_batch_rows: int | None = setting(
        None, "Most rows of one forward and backward pass; none: only the tokens count.", unit="rows", ge=1
    )
    logits_chunk_tokens: int = setting(
        4096, "Positions whose logits are in memory at once.", unit="tokens", ge=1
    )
    max_bad_updates: int = setting(
        3,
        "Updates in a row with a loss or gradient that is not finite before the run stops.",
        unit="updates",
        ge=1,
    )
    lora: LoraConfig = setting(LoraConfig(), "Low-rank additions.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "Optimizer.")


class CriticConfig(RoleConfig):
    """The learned judge of tokens: a value model if a chosen function reads `values`, an implicit process
    reward model if `prm_logprobs`.
    """

    vf_coef: float = setting(1.0, "Weight of the value loss.", gt=0)
    warmup_steps: int = setting(
        0, "First steps in which only the critic learns.", unit="steps", source="VAPO, 2504.05118", ge=0
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig(lr=1e-5), "Optimizer.", source="verl")


class TeacherConfig(Section):
    """The model that a policy is distilled from; it exists if and only if a chosen function reads a column of
    it.
    """

    path: str | None = setting(
        None, "Folder or hub name of a causal language model with the policy's vocabulary."
    )
    top_k: int = setting(16, "Most likely tokens whose logprobs a loss may read.", unit="tokens", ge=1)


class SamplingConfig(Section):
    """How answers are drawn."""

    temperature: float = setting(1.0, "Logits are divided by it; 0: the most likely token.", ge=0)
    top_p: float = setting(
        1.0, "Smallest set of tokens with this mass is kept.", source="1904.09751", gt=0, le=1
    )
    top_k: int = setting(0, "Tokens kept; 0: all.", unit="tokens", ge=0)
    min_p: float = setting(
        0.0,
        "Tokens below this share of the largest probability are dropped.",
        source="2407.01082",
        ge=0,
        le=1,
    )
    max_tokens: int = setting(128, "Longest answer.", unit="tokens", ge=1)
    stop: tuple[str, ...] = setting((), "Texts that end an answer.")
    stop_ids: tuple[int, ...] = setting((), "Token ids that end an answer, besides the tokenizer's own.")


class RolloutConfig(Section):
    """The engines that answer prompts."""

    engine: str = setting(
        "embedded",
        "embedded: the policy itself; vllm, sglang; served: servers of the embedded engine (verl serve); http: any OpenAI-compatible server, "
        'whose weights are its own; or "package.module:Class".',
        source="HybridFlow, 2409.19256, 6",
    )
    servers: int = setting(
        0,
        "Servers that the run starts on this machine; 0 without addresses: the engine is in the policy's processes.",
        ge=0,
    )
    addresses: tuple[str, ...] = setting((), "Servers that run already, http://HOST:PORT.")
    engine_options: Options = setting(
        Options(), "What the engine itself offers, passed on as it is, such as tensor_parallel_size."
    )
    python: str | None = setting(
        None,
        "Interpreter of the environment that has the engine, for servers that the run starts; none: this one.",
    )
    secret_env: str = setting(
        "VERL_SERVER_SECRET", "Environment variable with the secret of the servers in rollout.addresses."
    )
    weights_via: Literal["auto", "shm", "group", "disk", "direct", "ipc"] = setting(
        "auto",
        "How weights travel to servers: gathered, into shared memory, over a process group or in files; direct: each rank of the policy sends "
        "its part; ipc: servers read them from the policy's GPU; auto: shm where it reaches a server, else group.",
    )
    on_update: Literal["keep", "recompute", "abort"] = setting(
        "keep",
        "Requests that run when new weights come: kept by the server, to go on with them; recompute: cut, and asked again with their tokens, "
        "so that the new weights compute their cache; or aborted, to begin anew.",
        source="AReaL, 2505.24298, 4.1",
    )
    max_slots: int = setting(
        256,
        "Answers generated at the same time by the embedded engine, or by each server.",
        unit="answers",
        ge=1,
    )
    timeout_s: float = setting(60.0, "Silence of a server after which it counts as hung.", unit="s", gt=0)
    servers_sleep: bool = setting(
        False,
        "Servers give their device memory back while the policy learns: for those that share devices with it; vllm and sglang.",
    )
    mismatch_warn: float = setting(
        0.01,
        "KL of sampler and trainer per token above which a step warns.",
        unit="nats",
        source="prime-rl",
        gt=0,
    )
    mismatch_stop: float | None = setting(
        None, "The same, above which the run stops; none: it never does.", unit="nats", gt=0
    )


class DataConfig(Section):
    """Where prompts come from."""

    train: str | None = setting(None, "JSONL, Parquet or Arrow file, saved `datasets` folder, or task:NAME.")
    test: str | None = setting(None, "The same for evaluation; task:NAME takes that task's held-out prompts.")
    prompt_key: str = setting("prompt", "Column with the prompt: text or chat messages.")
    answer_key: str = setting(
        "answer", "Column with the reference answer, for the rewards; for fine-tuning, the answer."
    )
    system_prompt: str | None = setting(None, "Put in front of chat prompts that have no system message.")
    max_prompt_tokens: int = setting(1024, "Longer prompts are dropped and counted.", unit="tokens", ge=1)
    on_malformed: Literal["stop", "skip"] = setting(
        "stop", "A row that cannot be read stops the start, or is skipped and counted."
    )
    shuffle: bool = setting(True, "Draw prompts in a seeded random order, a new one in each epoch.")


class PairsDataConfig(DataConfig):
    """Where pairs come from."""

    chosen_key: str = setting("chosen", "Column with the better answer of a pair.")
    rejected_key: str = setting("rejected", "Column with the worse answer of a pair.")


class RewardsConfig(Section):
    """What an answer is worth: the weighted sum of functions."""

    functions: tuple[WeightedChoice, ...] = setting(
        (), 'Functions by name, `verl.rewards`, or as "package.module:function".'
    )
    timeout_s: float = setting(30.0, "Time limit of one call.", unit="s", gt=0)
    max_failed_share: float = setting(
        0.5, "Share of a step's answers without a reward above which the run stops.", ge=0, le=1
    )


# A step of a large model may take long, and what works in other processes does not say that it moves.
STALL_LIMIT_S = 3600.0
FailureClass = Literal["infrastructure", "data", "reward", "environment"]
_RETRIES: dict[FailureClass, int] = {"infrastructure": 2, "data": 0, "reward": 1, "environment": 2}


class PipelineConfig(Section):
    """Collection ahead of training, and what is done about groups that fail."""

    max_staleness: int = setting(
        0,
        "Steps by which a token may be older than the policy that learns from it. 0: on-policy; 1: one step off; more: fully asynchronous.",
        unit="steps",
        source="AReaL, 2505.24298, 5.1",
        ge=0,
    )
    oversample: int = setting(
        0,
        "Prompts in work beyond those of the steps; as many of the slowest are aborted per step.",
        unit="prompts",
        ge=0,
    )
    batches: Literal["arrival", "streamed", "deterministic"] = setting(
        "arrival",
        "arrival: of the groups that are complete first; streamed: also learned from while the last of them are answered; deterministic: of "
        "the oldest groups, each answered by one version, so that a run can be repeated.",
    )
    survivors: Choice = setting(
        Choice.model_validate({"name": "drop", "least": 1}),
        "What becomes of a group with fewer than `least` answers that have a reward: drop it for another prompt, or refill it.",
        source="tinker",
    )
    retries: dict[FailureClass, int] = setting(
        _RETRIES,
        "Times that a group is tried again after a failure of each class: infrastructure, data, reward, environment.",
    )
    max_failures_in_a_row: int = setting(
        16, "Groups that fail one after the other before the run stops with the cause.", unit="groups", ge=1
    )
    stall_limit_s: float = setting(
        STALL_LIMIT_S,
        "Time in which nothing moves before the run stops and says what it waits for.",
        unit="s",
        gt=0,
    )

    @field_validator("retries")
    @classmethod
    def _all_classes(cls, retries: dict[FailureClass, int]) -> dict[FailureClass, int]:
        if any(count < 0 for count in retries.values()):
            raise ValueError(f"need counts of at least 0, got {retries}")
        return {**_RETRIES, **retries}

    @field_validator("survivors")
    @classmethod
    def _rule(cls, survivors: Choice) -> Choice:
        least = survivors.options.get("least", 1)
        if (
            survivors.name not in ("drop", "refill")
            or survivors.options.keys() - {"least"}
            or type(least) is not int
            or least < 1
        ):
            raise ValueError(
                f"need {{name: drop or refill, least: answers of at least 1}}, got {survivors.model_dump()}"
            )
        return survivors


class EvaluationConfig(Section):
    """Held-out prompts, answered by the current policy."""

    every_steps: int = setting(0, "Steps between evaluations; 0: never.", unit="steps", ge=0)
    at_start: bool = setting(True, "Also before the first step.")
    prompts: int | None = setting(None, "Prompts used, from the first on; none: all.", unit="prompts", ge=1)
    samples: int = setting(1, "Answers per prompt, k of mean@k and pass@k.", unit="answers", ge=1)
    temperature: float = setting(1.0, "Temperature of these answers.", ge=0)


class CheckpointConfig(Section):
    """What is kept on disk to go on from."""

    every_steps: int = setting(0, "Steps between checkpoints; 0: only at the end.", unit="steps", ge=0)
    keep: int = setting(2, "Newest checkpoints kept.", unit="checkpoints", ge=1)
    resume: str = setting(
        "auto", "auto: from the newest complete one in output_dir; never; or the folder of one."
    )


class TrackingConfig(Section):
    """Where metrics and samples go."""

    sinks: tuple[str, ...] = setting(
        ("console", "jsonl", "tensorboard"), "console, jsonl, tensorboard, wandb, mlflow."
    )
    project: str = setting("verl", "Project name for W&B and MLflow.")
    samples_every_steps: int = setting(
        10, "Steps between tables of sampled answers on disk; 0: never.", unit="steps", ge=0
    )
    num_samples: int = setting(8, "Answers in such a table.", unit="answers", ge=1)


class ParallelConfig(Section):
    """How one model is spread over the devices of its pool; what the sizes leave over are data ranks (with
    FSDP2, shards of the weights).
    """

    tensor: int = setting(
        1,
        "Devices that share every matrix (tensor parallel).",
        unit="devices",
        source="Megatron-LM, 1909.08053",
        ge=1,
    )
    sequence: int = setting(
        1,
        "Devices that share every row (sequence parallel).",
        unit="devices",
        source="Ulysses, 2309.14509",
        ge=1,
    )
    pipeline: int = setting(
        1,
        "Stages of layers, one after the other; megatron.",
        unit="devices",
        source="Megatron-LM, 2104.04473",
        ge=1,
    )
    replicas: int = setting(
        1,
        "Whole copies of the sharded weights (hybrid shard).",
        unit="copies",
        source="FSDP, 2304.11277",
        ge=1,
    )
    offload: bool = setting(
        False,
        "Keep weights and optimizer in the memory of the host between their uses.",
        source="ZeRO-Offload, 2101.06840",
    )
    engine: Choice = setting(
        Choice(name="fsdp"),
        'fsdp (FSDP2), megatron (Megatron-Core), or "package.module:function", with its options.',
    )


class PlacementConfig(Section):
    """Which roles share which devices, and how each model is spread over them. `placement=NAME` is short for
    its name.
    """

    name: Literal["local", "colocated", "split", "standalone"] = setting(
        "local",
        "local: one device, everything in this process; colocated: all roles in turn on one pool; split: policy and reference on one "
        "pool, critic, teacher and reward model on another; standalone: a pool for each role.",
        source="HybridFlow, 2409.19256, 8.3",
    )
    devices: tuple[int, ...] = setting(
        (),
        "Devices of each pool, in the order policy, reference, critic, teacher, reward model; none: as many as its models need.",
        unit="devices",
    )
    policy: ParallelConfig = setting(ParallelConfig(), "How the policy is spread.")
    critic: ParallelConfig = setting(ParallelConfig(), "How the critic is spread.")
    reference: ParallelConfig = setting(
        ParallelConfig(), "How the reference, the teacher and the reward model are spread."
    )
    address: str = setting(
        "auto",
        "Ray cluster: auto joins the one that runs here or starts one; local always starts one; or HOST:PORT.",
    )
    hang_limit_s: float = setting(
        600.0,
        "Time that some ranks wait in a collective for the others before the run stops and says for whom.",
        unit="s",
        gt=0,
    )


class StrategyMapping(Section):
    """The layouts that the policy goes between."""

    rollout: Literal["tensor_parallel"] = setting("tensor_parallel", "Layout of the weights that generate.")
    training: Literal["auto", "fsdp", "megatron"] = setting(
        "auto", "Layout of the weights that train; auto: that of placement.policy.engine."
    )


class RepartitionConfig(Section):
    """How the policy goes from its training layout to its generation layout and back (3D-HybridEngine)."""

    enabled: bool = setting(
        False,
        "Generate in a layout of its own, to which only the slices travel that a rank lacks.",
        source="HybridFlow, 2409.19256, 5",
    )
    strategy_mapping: StrategyMapping = setting(StrategyMapping(), "From which layout to which.")
    tensor: int = setting(
        0,
        "Devices that share every matrix in generation; 0: as many as have different parts of it in training and divide it, within a machine.",
        unit="devices",
        source="HybridFlow, 5.3",
        ge=0,
    )
    communication_overlap: bool = setting(
        True, "The next weights travel while the last ones are put in their place."
    )


class HybridConfig(Section):
    """The 3D-HybridEngine."""

    actor_repartition: RepartitionConfig = setting(
        RepartitionConfig(), "Resharding of the policy between training and generation."
    )


class RunConfig(Section):
    """What every run has, whatever it learns from."""

    seed: int = setting(0, "Seed of the data order, the sampling and new weights.", ge=0)
    output_dir: str = setting("outputs/run", "Folder of metrics, samples, checkpoints and the trained model.")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU where there is one.")
    steps: int = setting(100, "Steps of the run.", unit="steps", ge=1)
    policy: RoleConfig = setting(RoleConfig(), "The model that learns to answer.")
    data: DataConfig = setting(DataConfig(), "Where prompts come from.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "What is kept to go on from.")
    tracking: TrackingConfig = setting(TrackingConfig(), "Where metrics and samples go.")


class SFTConfig(RunConfig):
    """A run of supervised fine-tuning."""

    rows_per_step: int = setting(64, "Examples of a step.", unit="examples", ge=1)


class PairsConfig(RunConfig):
    """A run on pairs of a better and a worse answer."""

    data: PairsDataConfig = setting(PairsDataConfig(), "Where pairs come from.")
    pairs_per_step: int = setting(
        64, "Pairs of a step.", unit="pairs", source="DPO, 2305.18290, appendix B", ge=1
    )
    eval_every_steps: int = setting(
        0, "Steps between evaluations on data.test; 0: only before the first and after the last.", ge=0
    )


class PreferenceConfig(PairsConfig):
    """A run that optimizes the policy on preferences directly."""

    loss: Choice = setting(
        Choice(name="dpo"), "Loss of a pair, `verl.algorithms.preference`.", source="DPO, 2305.18290"
    )
    reference: str | None = setting(
        None, "Model of the reference policy; none: the policy as it was at the start."
    )


class RewardModelConfig(PairsConfig):
    """A run that teaches a model with a scalar head which answers are better."""

    loss: Choice = setting(
        Choice(name="bradley_terry"),
        "Loss of a pair, `verl.algorithms.preference`.",
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
    algorithm: AlgorithmConfig = setting(AlgorithmConfig(), "The method.")
    critic: CriticConfig = setting(CriticConfig(), "The learned judge of tokens.")
    reference: str | None = setting(
        None, "Model of the reference policy; none: the policy as it was at the start."
    )
    teacher: TeacherConfig = setting(TeacherConfig(), "The model to distil from.")
    sampling: SamplingConfig = setting(SamplingConfig(), "How answers are drawn.")
    rollout: RolloutConfig = setting(RolloutConfig(), "The engine that answers prompts.")
    rewards: RewardsConfig = setting(RewardsConfig(), "What an answer is worth.")
    pipeline: PipelineConfig = setting(PipelineConfig(), "Collection ahead of training.")
    evaluation: EvaluationConfig = setting(EvaluationConfig(), "Held-out prompts.")
    placement: PlacementConfig = setting(PlacementConfig(), "Which devices do what.")
    hybrid_engine: HybridConfig = setting(
        HybridConfig(), "The switch of the policy between training and generation."
    )
