"""Settings of the models: policy, critic and teacher, with their optimizers and LoRA adapters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from verl.config.fields import NameText, Options, PathText, Section, setting


class OptimizerConfig(Section):
    """The optimizer and its learning rate schedule."""

    name: NameText = setting(
        "adamw",
        "adamw; muon, for the matrices of the layers, with AdamW for all other weights; another class of "
        'torch.optim, such as sgd or adafactor; or "package.module:Class".',
    )
    options: Options = setting(
        Options(), "Further arguments of the class, such as momentum; of muon, those of torch.optim.Muon."
    )
    lr: float = setting(1e-6, "Peak learning rate.", source="GRPO, 2402.03300, 4.2", gt=0)
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Decay of the first and second moment.", source="Adam, 1412.6980"
    )
    eps: float = setting(1e-8, "Added to the root of the second moment.", source="Adam, 1412.6980", gt=0)
    weight_decay: float = setting(
        0.0,
        "Weight decay of matrices, decoupled in AdamW and Muon; vectors are not decayed.",
        ge=0,
    )
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
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"need two numbers in [0, 1), got {list(betas)}")
        return betas


class LoraConfig(Section):
    """LoRA adapters, trained instead of the weights of the model."""

    rank: int = setting(0, "Rank of the adapters; 0: train all weights.", source="LoRA, 2106.09685", ge=0)
    path: PathText | None = setting(
        None,
        "Folder or hub name of a PEFT adapter to train on, with its own rank, alpha and targets.",
    )
    alpha: float = setting(
        32.0, "The output of an adapter is scaled by alpha / rank.", source="LoRA, 2106.09685", gt=0
    )
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Names of the linear layers that get an adapter; all-linear: all but the output layer.",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), "Names of layers that are trained whole beside the adapters, such as lm_head.", source="PEFT"
    )
    dropout: float = setting(
        0.0, "Share of an adapter's inputs that updates set to 0; other passes use all.", ge=0, lt=1
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(rank) instead.", source="rsLoRA, 2312.03732")
    use_dora: bool = setting(
        False, "Train the norm of each row of a matrix, too (DoRA).", source="DoRA, 2402.09353"
    )
    quantize: Literal["none", "4bit"] = setting(
        "none",
        "4bit: the frozen weights are in 4 bits (NF4), by bitsandbytes on a GPU.",
        source="QLoRA, 2305.14314",
    )

    @field_validator("targets", "modules_to_save", mode="before")
    @classmethod
    def _accept_one_name(cls, names: Any) -> Any:
        """A single name may be given without brackets."""
        if isinstance(names, str):
            return (names,)
        return tuple(names) if isinstance(names, list) else names

    @property
    def is_on(self) -> bool:
        """True if adapters are trained."""
        return self.rank > 0 or self.path is not None


class RoleConfig(Section):
    """A trained model: weights, memory, optimizer."""

    path: PathText | None = setting(None, "Folder or hub name of a Hugging Face causal language model.")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "Arithmetic of forward and backward; weights and optimizer stay fp32."
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, a third more arithmetic.",
        source="1604.06174",
    )
    packing: bool = setting(
        True, "Compute rows back to back without padding; off: rows are padded to the longest one."
    )
    micro_batch_tokens: int | None = setting(
        None,
        "Largest number of tokens in one forward and backward pass; none: 16,384, on a CPU fewer for a large "
        "model, so that their activations take 0.5 GiB.",
        unit="tokens",
        ge=1,
    )
    micro_batch_rows: int | None = setting(
        None,
        "Largest number of rows in one forward and backward pass; none: only the tokens count.",
        unit="rows",
        ge=1,
    )
    logits_chunk_tokens: int | None = setting(
        None,
        "Positions whose logits are in memory at once; none: 4096, fewer for a large vocabulary, so that "
        "logits take at most 1 GiB, on a CPU 32 MiB.",
        unit="tokens",
        ge=1,
    )
    max_bad_updates: int = setting(
        3,
        "Consecutive updates with a loss or gradient that is not finite, after which the run stops.",
        unit="updates",
        ge=1,
    )
    lora: LoraConfig = setting(LoraConfig(), "LoRA adapters.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "Optimizer.")


class CriticConfig(RoleConfig):
    """The model that judges tokens.

    A value model if a chosen function reads `values`, an implicit process reward model if one reads
    `prm_logprobs`.
    """

    vf_coef: float = setting(1.0, "Weight of the value loss.", gt=0)
    warmup_steps: int = setting(
        0, "First steps in which only the critic is trained.", unit="steps", source="VAPO, 2504.05118", ge=0
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig(lr=1e-5), "Optimizer.", source="verl")


class TeacherConfig(Section):
    """The model to distil the policy from; it is loaded only if a chosen function reads its columns."""

    path: PathText | None = setting(
        None, "Folder or hub name of a causal language model with the policy's vocabulary."
    )
    top_k: int = setting(16, "Most likely tokens whose logprobs a loss may read.", unit="tokens", ge=1)
