"""Megatron-Core models on packed rows: pipeline stages, attention by rows, and the heads of other engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from verl.data.batch import ModelInput
from verl.engines.hf.attention import attention_forward
from verl.engines.hf.models import Backbone, PolicyModel, Precision, ValueModel
from verl.engines.hf.row_layouts import RowLayout, use_layout
from verl.engines.megatron.model_spec import MegatronModelSpec
from verl.engines.megatron.parallel_dims import RankCoordinates
from verl.engines.sequence_parallel import SequenceGroup
from verl.engines.tensor_parallel import without_padding_gradient

# In shapes: N tokens of a packed sequence, padded to a multiple of the ranks that share it, n of them on this
# rank, H heads, D head size.


@dataclass
class PackedAttentionParams(PackedSeqParams):
    """Arguments that Megatron-Core passes to the attention of every layer.

    To Megatron-Core a packed sequence is one sequence; `layout` separates its rows.
    """

    qkv_format: str = "sbhd"
    layout: RowLayout | None = None


@dataclass(frozen=True)
class PackedSequence:
    """Rows end to end, as the input of a rank.

    Attributes:
        input_ids: [1, n].
        position_ids: [1, n].
        params: for the attention.
        num_places: N, padding included.
    """

    input_ids: Tensor
    position_ids: Tensor
    params: PackedAttentionParams
    num_places: int

    @classmethod
    def from_inputs(
        cls, inputs: ModelInput, sequence: SequenceGroup | None, num_places: int
    ) -> PackedSequence:
        """The packed rows, padded with tokens that belong to no row and that no row attends to."""
        layout = RowLayout.from_inputs(inputs)
        to_padded, from_padded = layout.padded_index
        padding = num_places - layout.num_positions
        # Attention at padding is never read, so its index may be any token of a row.
        index = (to_padded, F.pad(from_padded, (0, padding)))
        ids, positions = (F.pad(ids, (0, padding)) for ids in (inputs.input_ids, inputs.position_ids))
        if sequence is not None:
            ids, positions = sequence.local_slice(ids), sequence.local_slice(positions)
        padded = RowLayout(inputs.lengths, True, layout.device, index=index, sequence=sequence)
        return cls(ids, positions, PackedAttentionParams(layout=padded), num_places)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a weight.

    Unlike Megatron-Core's own it also supports sequence parallelism without TransformerEngine.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Tells Megatron-Core to sum its gradient over the ranks that share the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: Tensor) -> Tensor:
        """The normalized states, of the same shape and dtype."""
        # In fp32, as Transformers does: the mean of squares loses too much in bf16.
        wide = states.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(states.dtype)


class RowAttention(MegatronModule):
    """Attention in which each row attends to itself.

    Ranks that share a packed sequence exchange tokens for heads (DeepSpeed-Ulysses).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__(config=config)
        self.layer_idx = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedAttentionParams,
        **__: Any,
    ) -> Tensor:
        """[n, 1, H * D] from query [n, 1, H, D], and key and value with their numbers of heads."""
        assert packed_seq_params.layout is not None
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        with use_layout(packed_seq_params.layout):
            attended, _none = attention_forward(self, query, key, value)
        return attended[0].flatten(1)[:, None]


class PipelineStage(GPTModel):
    """A model chunk: consecutive layers, with the embedding before the first and the head after the last.

    The last chunk of a model returns the final states, [N, hidden], for its head; all others return the input
    of the next one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: MegatronModelSpec,
        *,
        has_embedding: bool,
        has_head: bool,
        chunk: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=_layer_spec(config, spec, chunk),
            vocab_size=spec.padded_vocab,
            max_sequence_length=spec.config.max_position_embeddings,
            pre_process=has_embedding,
            post_process=has_head,
            share_embeddings_and_output_weights=spec.is_tied,
            position_embedding_type="none",
            vp_stage=chunk,
        )
        self._padding_id: int | None = spec.config.pad_token_id
        self.register_buffer(
            "frequencies", spec.inverse_frequencies().to(torch.cuda.current_device()), persistent=False
        )
        if has_head and spec.kind == "value":
            del self.output_layer
            options = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
            self.value_head = nn.utils.skip_init(nn.Linear, config.hidden_size, 1, **options)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> tuple[Any, ...]:
        states = self._embed(input_ids, position_ids) if self.pre_process else None
        angles = position_ids[0, :, None].float() * self.frequencies
        return states, torch.cat([angles, angles], -1)[:, None, None], None, None, None, None

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[n, 1, hidden]; with sequence parallelism the tokens of this tensor rank."""
        states: Tensor = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if self._padding_id is None:
            return states
        rank = parallel_state.get_tensor_model_parallel_rank() if self.config.sequence_parallel else 0
        ids = input_ids[0, rank * len(states) : (rank + 1) * len(states), None]
        return without_padding_gradient(states, ids, self._padding_id)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The head's backward pass sums over the ranks already; here each takes its tokens of the sum.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return hidden_states[:, 0]


def _layer_spec(
    config: TransformerConfig, spec: MegatronModelSpec, chunk: int | None
) -> TransformerBlockSubmodules:
    """The modules of which Megatron-Core builds the layers of a chunk."""
    layer_spec = get_gpt_layer_local_spec(
        num_experts=spec.num_experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=spec.has_head_norms,
        normalization="RMSNorm",
    )
    layer, attention = layer_spec.submodules, layer_spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = RowAttention
    if spec.has_head_norms:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers, layer_norm=RMSNorm)


class PipelineStages(nn.ModuleList):
    """The model chunks of this rank, which take the place of a Transformers model.

    Attributes:
        config: of the model, in Transformers.
    """

    def __init__(self, stages: Iterable[PipelineStage], config: PretrainedConfig) -> None:
        super().__init__(stages)
        self.config = config


class LastStageModel(Backbone):
    """A model whose heads read the final states that the pipeline has just computed for a micro-batch.

    Attributes:
        packed: the input of that micro-batch.
        states: its final states, [n, hidden].
    """

    packed: PackedSequence
    states: Tensor

    @override
    def predictor_states(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        if self.sequence is None:
            return self.states.index_select(0, inputs.predictors), None
        own, places = self.sequence.local_indices(inputs.predictors, self.packed.num_places)
        return self.states.index_select(0, places), own


class MegatronPolicy(LastStageModel, PolicyModel):
    """A policy whose head is divided over tensor ranks; each gathers the logits of a chunk of tokens."""

    def __init__(
        self, stages: PipelineStages, spec: MegatronModelSpec, precision: Precision, *, has_head: bool
    ) -> None:
        super().__init__(stages, precision)  # type: ignore[arg-type]
        self._vocab = spec.config.vocab_size
        # In a tuple, so that PyTorch does not register the parameter a second time.
        self._head_weight: tuple[Tensor, ...] = ()
        if has_head:
            last: Any = stages[-1]
            is_tied = spec.is_tied
            self._head_weight = (
                last.shared_embedding_or_output_weight() if is_tied else last.output_layer.weight,
            )

    @override
    def head_logits(self, states: Tensor) -> Tensor:
        """[M, V] fp32 from states [M, hidden]; on the last stage only."""
        local = F.linear(copy_to_tensor_model_parallel_region(states), self._head_weight[0])
        # Rows of the padded vocabulary are cut off.
        return gather_from_tensor_model_parallel_region(local)[:, : self._vocab].float()


class MegatronValue(LastStageModel, ValueModel):
    """A value model, whose head is whole on every tensor rank."""

    def __init__(self, stages: PipelineStages, precision: Precision, *, has_head: bool) -> None:
        Backbone.__init__(self, stages, precision)  # type: ignore[arg-type]
        if has_head:
            last: Any = stages[-1]
            self.head = last.value_head


def transformer_config(
    spec: MegatronModelSpec, coordinates: RankCoordinates, precision: Precision, options: dict[str, Any]
) -> TransformerConfig:
    """Megatron-Core's configuration of a model; options are fields of it.

    Raises:
        ValueError: Megatron-Core refuses the model or the options.
    """
    sizes = coordinates.sizes
    is_interleaved = sizes.virtual_pipeline > 1
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    fields: dict[str, Any] = {
        **_layer_fields(spec),
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline if is_interleaved else None,
        "context_parallel_size": sizes.context,
        "expert_model_parallel_size": max(1, sizes.expert),
        "expert_tensor_parallel_size": 1 if sizes.expert else None,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        # Weights are read from a folder; only the padding of the vocabulary stays 0.
        "init_method": nn.init.zeros_,
        "output_layer_init_method": nn.init.zeros_,
        "embedding_init_method": nn.init.zeros_,
        # Micro-batches have as many tokens as their rows; interleaved stages need equal numbers.
        "variable_seq_lengths": sizes.pipeline > 1 and not is_interleaved,
        # The other token dispatchers need sequences of the same length on all data ranks.
        "moe_token_dispatcher_type": "alltoall",
        # The loss is a sum over all rows of an update, so gradients are summed and not averaged.
        "calculate_per_token_loss": True,
        # Between interleaved stages, states and gradients travel in both directions at once; batched messages
        # would mix them up.
        "batch_p2p_comm": not is_interleaved,
        "overlap_p2p_comm": is_interleaved,
        # Fused operations need Apex or TransformerEngine, or are compiled.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    try:
        return TransformerConfig(**{**fields, **options})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Megatron-Core refuses this model or its options: {error}") from error


def _layer_fields(spec: MegatronModelSpec) -> dict[str, Any]:
    """Fields of Megatron-Core's configuration that say what a layer computes."""
    config = spec.config
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.has_qkv_bias,
        "qk_layernorm": spec.has_head_norms,
        # Dropout would make the sampler and the trainer two different policies.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if not spec.is_moe:
        return fields
    return fields | {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": spec.mlp_size,
        # Without it the probabilities of the chosen experts are normalized, as Transformers does by default.
        "moe_router_pre_softmax": not config.to_dict().get("norm_topk_prob", True),
        "moe_router_load_balancing_type": "none",
    }


def make_stages(
    config: TransformerConfig, spec: MegatronModelSpec, coordinates: RankCoordinates
) -> PipelineStages:
    """The model chunks of this rank, without weights; called inside `RankCoordinates.active`."""
    num_chunks = coordinates.sizes.virtual_pipeline
    stages = [
        PipelineStage(
            config,
            spec,
            has_embedding=coordinates.stage == 0 and chunk == 0,
            has_head=coordinates.is_last_stage and chunk == num_chunks - 1,
            chunk=chunk if num_chunks > 1 else None,
        )
        for chunk in range(num_chunks)
    ]
    return PipelineStages(stages, spec.config)
