"""Least time of one training step on a given machine, from arithmetic and memory traffic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.utils.device import MachineSpeed

# Names in Hugging Face configurations. With one of the second kind set, a token does not use every weight or
# attend to every earlier token, or the cache holds something else than keys and values.
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_NOT_DENSE = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "sliding_window")


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: attention with grouped heads, gated MLP (three matrices), output head.

    Attributes:
        layers: number of blocks, L.
        hidden: width of the residual stream, H.
        q_heads: query heads, q.
        kv_heads: key and value heads, kv.
        head_dim: width of a head, h.
        intermediate: width of the MLP, I.
        vocab: rows of the output head, V.
        tied: the embedding is the output head, stored once.
    """

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = True

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """Shape of a Transformers configuration, or of its text part if the model has several.

        Raises:
            ValueError: a mixture of experts, attention that is not full, or no gated MLP: the formulas do not
                cover them.
        """
        text = config.get_text_config().to_dict()
        if text.get("use_sliding_window") is False:
            text["sliding_window"] = None
        partial = {kind for kind in text.get("layer_types") or () if kind != "full_attention"}
        odd = sorted({name for name in _NOT_DENSE if text.get(name)} | partial)
        missing = [name for name in _NEEDED if not text.get(name)]
        if odd or missing:
            found = f"got {text.get('model_type')} with {odd} and without {missing}"
            raise ValueError(
                f"need a dense decoder with full attention and a gated MLP, {found}; "
                "its step limit is not known"
            )
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        return cls(
            layers=text["num_hidden_layers"],
            hidden=hidden,
            q_heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            intermediate=text["intermediate_size"],
            vocab=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings")),
        )

    @property
    def body_weights(self) -> int:
        """Weights of the matrices of all blocks, L (H (q + 2 kv) h + q h H + 3 H I)."""
        attention = (
            self.hidden * (self.q_heads + 2 * self.kv_heads) * self.head_dim
            + self.q_heads * self.head_dim * self.hidden
        )
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output head, H V."""
        return self.hidden * self.vocab

    @property
    def matmul_weights(self) -> int:
        """Weights that every generated token is multiplied with.

        The embedding is left out: it is a look-up without arithmetic, and one row is few bytes.
        """
        return self.body_weights + self.head_weights

    @property
    def stored_weights(self) -> int:
        """Weights that the optimizer updates; vectors (norms, biases) are left out as negligible."""
        return self.matmul_weights + (0 if self.tied else self.head_weights)

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token leaves in the cache, 2 L kv h."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class StepWork:
    """Work of one step.

    Attributes:
        prompt_lengths: [B] int, tokens of the prompt of each trajectory.
        response_lengths: [B] int, tokens of its response.
        num_prompts: different prompts among the B; a group's prompt need be read only once.
        updates: optimizer updates of the step.
        max_slots: trajectories generated at the same time.
        bytes_per_weight: of weights and cached keys and values in generation, 4 for fp32, 2 for bf16 and
            fp16.
        epochs: passes of training over the trajectories.
    """

    prompt_lengths: Tensor
    response_lengths: Tensor
    num_prompts: int
    updates: int
    max_slots: int
    bytes_per_weight: int
    epochs: int = 1

    def __post_init__(self) -> None:
        if (
            self.prompt_lengths.shape != self.response_lengths.shape
            or self.prompt_lengths.ndim != 1
            or not len(self.prompt_lengths)
        ):
            shapes = f"{tuple(self.prompt_lengths.shape)} and {tuple(self.response_lengths.shape)}"
            raise ValueError(
                f"need one prompt length and one response length per trajectory, got shapes {shapes}"
            )
        rows = len(self.prompt_lengths)
        if not 1 <= self.num_prompts <= rows or self.max_slots < 1:
            raise ValueError(
                f"need 1 <= num_prompts <= {rows} and max_slots >= 1, "
                f"got {self.num_prompts} and {self.max_slots}"
            )


@dataclass(frozen=True)
class StepLimit:
    """Least seconds of each phase of a step; each phase needs the results of the one before."""

    prefill_s: float
    generate_s: float
    train_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """Least seconds of the whole step: the sum of its phases."""
        return self.prefill_s + self.generate_s + self.train_s + self.optimizer_s


def forward_flops(shape: ModelShape, prompt_tokens: Tensor, response_tokens: Tensor) -> Tensor:
    """FLOPs of one causal forward pass, F1 = 2 N_body S + 2 N_head R + 2 L q h S^2 with S = P + R.

    The head is applied to response positions only. The last term is attention, two products over half of the
    S x S pairs; PaLM, https://arxiv.org/abs/2204.02311, appendix B, counts all pairs and the head everywhere.

    Args:
        shape: of the model.
        prompt_tokens: [B] int, P of each sequence.
        response_tokens: [B] int, R of each sequence.

    Returns:
        [B] float64.
    """
    prompt, response = prompt_tokens.double(), response_tokens.double()
    total = prompt + response
    attention = 2 * shape.layers * shape.q_heads * shape.head_dim * total**2
    return 2 * shape.body_weights * total + 2 * shape.head_weights * response + attention


def prefill_seconds(shape: ModelShape, work: StepWork, speed: MachineSpeed) -> float:
    """Least seconds to prefill each different prompt once: num_prompts times the mean of F1(P, 0) / F."""
    flops = forward_flops(shape, work.prompt_lengths, torch.zeros_like(work.prompt_lengths))
    return work.num_prompts * float(flops.mean()) / speed.flops_per_s


def rollout_seconds(shape: ModelShape, work: StepWork, speed: MachineSpeed) -> float:
    """Least seconds to generate all responses with a key-value cache.

    At least max(R_max, ceil(sum(R) / slots)) iterations, each of which reads all matrices; token t of a
    response also reads the P + t tokens in the cache. With k bytes of cache per token and W bytes of matrices
        T >= max((W iterations + k sum(P R + R^2 / 2)) / bandwidth, sum(2 N R + 4 L q h (P R + R^2 / 2)) / F).
    The two bounds, memory traffic and arithmetic, are the roofline applied to decoding,
    https://doi.org/10.1145/1498765.1498785.
    """
    prompt, response = work.prompt_lengths.double(), work.response_lengths.double()
    cache_reads = float((prompt * response + response**2 / 2).sum())
    num_tokens = int(work.response_lengths.sum())
    iterations = max(int(work.response_lengths.max()), -(-num_tokens // work.max_slots))
    moved = work.bytes_per_weight * (
        shape.matmul_weights * iterations + shape.kv_values_per_token * cache_reads
    )
    flops = (
        2 * shape.matmul_weights * num_tokens
        + 4 * shape.layers * shape.q_heads * shape.head_dim * cache_reads
    )
    return max(moved / speed.bytes_per_s, flops / speed.flops_per_s)


def train_seconds(shape: ModelShape, work: StepWork, speed: MachineSpeed) -> float:
    """Least seconds of forward and backward passes over every trajectory in every epoch, 3 sum(F1) / F.

    Recomputed activations are not counted.
    """
    flops = float(forward_flops(shape, work.prompt_lengths, work.response_lengths).sum())
    return work.epochs * 3 * flops / speed.flops_per_s


def optimizer_seconds(shape: ModelShape, work: StepWork, speed: MachineSpeed) -> float:
    """Least seconds of AdamW in fp32 at full bandwidth.

    For each weight and update, 28 bytes: weight, gradient and two moments are read (16), weight and moments
    written (12); and 2 more for a 16-bit copy for generation.
    """
    bytes_per_update = 28 + (work.bytes_per_weight if work.bytes_per_weight < 4 else 0)
    return work.updates * bytes_per_update * shape.stored_weights / speed.bytes_per_s


def step_limit(shape: ModelShape, work: StepWork, speed: MachineSpeed) -> StepLimit:
    """Least time of a synchronous step of one policy that shares its weights with generation.

    This limit divided by the measured time is the share of the machine that a step used. The phases are those
    of HybridFlow, https://arxiv.org/abs/2409.19256, section 2. Forward passes for old and reference logprobs
    are not counted, because a step can do without both.
    """
    return StepLimit(
        prefill_s=prefill_seconds(shape, work, speed),
        generate_s=rollout_seconds(shape, work, speed),
        train_s=train_seconds(shape, work, speed),
        optimizer_s=optimizer_seconds(shape, work, speed),
    )
