"""Models of Megatron-Core that read packed rows: layers, attention by rows, and heads as the other engines
have them.
"""

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
from verl.engines.hf.attention import RowLayout, attention_forward
from verl.engines.hf.models import Backbone, PolicyModel, Precision, ValueModel
from verl.engines.megatron.parallel_dims import RankCoordinates
from verl.engines.megatron.weight_mapping import MegatronModelSpec
from verl.engines.sequence_parallel import SequenceGroup
from verl.engines.tensor_parallel import without_padding_gradient

# In shapes: N places of a line, filled up to a multiple of the ranks that share it, n of them on this rank, H
# heads, D head size.


@dataclass
class PackedAttentionParams(PackedSeqParams):
    """What Megatron-Core hands through to the attention of every layer: a line is one sequence, and `layout`
    knows its rows.
    """

    qkv_format: str = "sbhd"
    layout: RowLayout | None = None


@dataclass(frozen=True)
class PackedSequence:
    """Rows end to end, as a rank reads them.

    Attributes:
        input_ids: [1, n].
        position_ids: [1, n].
        params: which places belong to which row.
        num_places: N.
    """

    input_ids: Tensor
    position_ids: Tensor
    params: PackedAttentionParams
    num_places: int

    @classmethod
    def of(cls, inputs: ModelInput, sequence: SequenceGroup | None, num_places: int) -> PackedSequence:
        """The line of packed rows, filled up by places that belong to no row and that nobody sees."""
        layout = RowLayout.from_inputs(inputs)
        to_padded, from_padded = layout.padded_index
        filler = num_places - layout.num_places
        # What stands in the filler places of the attention is never read: any place of a row will do.
        index = (to_padded, F.pad(from_padded, (0, filler)))
        ids, positions = (F.pad(line, (0, filler)) for line in (inputs.input_ids, inputs.position_ids))
        if sequence is not None:
            ids, positions = sequence.local_slice(ids), sequence.local_slice(positions)
        filled = RowLayout(inputs.lengths, True, layout.device, index=index, sequence=sequence)
        return cls(ids, positions, PackedAttentionParams(layout=filled), num_places)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a weight; of places that tensor ranks share, too, which Megatron-Core's
    own refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Its gradient is a sum over the ranks that share the places.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: Tensor) -> Tensor:
        """The same shape and precision."""
        wide = states.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(
            states.dtype
        )


class RowAttention(MegatronModule):
    """Each row attends to itself, also over ranks that share the line: each then has a share of the heads
    (DeepSpeed-Ulysses).
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
        """[n, 1, H * D] from query, key and value [n, 1, ., D]."""
        assert packed_seq_params.layout is not None
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        attended, _none = attention_forward(self, query, key, value, layout=packed_seq_params.layout)
        return attended[0].flatten(1)[:, None]


class PipelineStage(GPTModel):
    """Consecutive layers, with the embedding before the first and the final norm and the head after the last
    of a model.

    The last chunk returns the states [N, hidden] that its head reads, all others what the next one takes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        anatomy: MegatronModelSpec,
        *,
        has_embedding: bool,
        has_head: bool,
        number: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=_layers(config, anatomy, number),
            vocab_size=anatomy.padded_vocab,
            max_sequence_length=anatomy.config.max_position_embeddings,
            pre_process=has_embedding,
            post_process=has_head,
            share_embeddings_and_output_weights=anatomy.is_tied,
            position_embedding_type="none",
            vp_stage=number,
        )
        self._padding_id: int | None = anatomy.config.pad_token_id
        self.register_buffer(
            "frequencies", anatomy.inverse_frequencies().to(torch.cuda.current_device()), persistent=False
        )
        if has_head and anatomy.kind == "value":
            del self.output_layer
            where = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
            self.value_head = nn.utils.skip_init(nn.Linear, config.hidden_size, 1, **where)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> tuple[Any, ...]:
        states = self._embedded(input_ids, position_ids) if self.pre_process else None
        angles = position_ids[0, :, None].float() * self.frequencies
        return states, torch.cat([angles, angles], -1)[:, None, None], None, None, None, None

    def _embedded(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[N, 1, hidden]; with sequence parallelism this rank's places."""
        states: Tensor = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if self._padding_id is None:
            return states
        first = (
            parallel_state.get_tensor_model_parallel_rank() * len(states)
            if self.config.sequence_parallel
            else 0
        )
        return without_padding_gradient(
            states, input_ids[0, first : first + len(states), None], self._padding_id
        )

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The head's own backward pass sums over the ranks; each takes its places of that.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return hidden_states[:, 0]


def _layers(
    config: TransformerConfig, anatomy: MegatronModelSpec, number: int | None
) -> TransformerBlockSubmodules:
    """What the layers of a chunk are made of."""
    spec = get_gpt_layer_local_spec(
        num_experts=anatomy.num_experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=anatomy.has_head_norms,
        normalization="RMSNorm",
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = RowAttention
    if anatomy.has_head_norms:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=number), layer_norm=RMSNorm
    )


class PipelineStages(nn.ModuleList):
    """The chunks of this rank, in the place of a Transformers model.

    Attributes:
        config: of the model, as Transformers has it.
    """

    def __init__(self, chunks: Iterable[PipelineStage], config: PretrainedConfig) -> None:
        super().__init__(chunks)
        self.config = config


class _OnLastStage(Backbone):
    """A model whose final states are those of the micro-batch that the pipeline has just brought.

    Attributes:
        line: of that micro-batch.
        states: [N, hidden] of it, or this rank's part of them.
    """

    line: PackedSequence
    states: Tensor

    @override
    def predictor_states(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        if self.sequence is None:
            return self.states.index_select(0, inputs.predictors), None
        own, places = self.sequence.local_indices(inputs.predictors, self.line.num_places)
        return self.states.index_select(0, places), own


class MegatronPolicy(_OnLastStage, PolicyModel):
    """A policy whose vocabulary is spread over tensor ranks; the logits of a chunk of places come together on
    each.
    """

    def __init__(
        self, chunks: PipelineStages, anatomy: MegatronModelSpec, precision: Precision, *, has_head: bool
    ) -> None:
        super().__init__(chunks, precision)  # type: ignore[arg-type]
        self._vocab = anatomy.config.vocab_size
        last: Any = chunks[-1]
        self._weight: tuple[Tensor, ...] = ()
        if has_head:
            self._weight = (
                last.shared_embedding_or_output_weight() if anatomy.is_tied else last.output_layer.weight,
            )

    def logits(self, states: Tensor) -> Tensor:
        """[M, V] fp32 from states [M, hidden]; on the last stage."""
        own = F.linear(copy_to_tensor_model_parallel_region(states), self._weight[0])
        return gather_from_tensor_model_parallel_region(own)[:, : self._vocab].float()


class MegatronValue(_OnLastStage, ValueModel):
    """A value model, whose head all tensor ranks have."""

    def __init__(self, chunks: PipelineStages, precision: Precision, *, has_head: bool) -> None:
        Backbone.__init__(self, chunks, precision)  # type: ignore[arg-type]
        last: Any = chunks[-1]
        if has_head:
            self.head = last.value_head


def transformer_config(
    anatomy: MegatronModelSpec, grid: RankCoordinates, precision: Precision, options: dict[str, Any]
) -> TransformerConfig:
    """The model as Megatron-Core describes it; options are fields of its own configuration.

    Raises:
        ValueError: Megatron-Core refuses them.
    """
    extents = grid.extents
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    fields: dict[str, Any] = {
        **_of_layers(anatomy),
        "tensor_model_parallel_size": extents.tensor,
        "pipeline_model_parallel_size": extents.pipeline,
        "virtual_pipeline_model_parallel_size": extents.virtual if extents.virtual > 1 else None,
        "context_parallel_size": extents.context,
        "expert_model_parallel_size": max(1, extents.expert),
        "expert_tensor_parallel_size": 1 if extents.expert else None,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        # Weights are read from a folder. Rows past the vocabulary stay 0.
        "init_method": nn.init.zeros_,
        "output_layer_init_method": nn.init.zeros_,
        "embedding_init_method": nn.init.zeros_,
        # Micro-batches have as many places as their rows; interleaved stages want them all alike.
        "variable_seq_lengths": extents.pipeline > 1 and extents.virtual == 1,
        # The other dispatchers of tokens to experts need lines of one length on all data ranks.
        "moe_token_dispatcher_type": "alltoall",
        # A loss is a sum over all rows of an update, so are its gradients.
        "calculate_per_token_loss": True,
        # Between two interleaved stages states and gradients travel both ways at once, which a batch of them
        # would mix up.
        "batch_p2p_comm": extents.virtual == 1,
        "overlap_p2p_comm": extents.virtual > 1,
        # Fused operations are of Apex or TransformerEngine, or compiled.
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


def _of_layers(anatomy: MegatronModelSpec) -> dict[str, Any]:
    """What the layers of a model compute, in Megatron-Core's words."""
    config = anatomy.config
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": anatomy.groups,
        "kv_channels": anatomy.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": anatomy.has_qkv_bias,
        "qk_layernorm": anatomy.has_head_norms,
        # Dropout would make the sampler and the trainer two different policies.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if not anatomy.is_mixture:
        return fields
    return fields | {
        "num_moe_experts": anatomy.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": anatomy.mlp_width,
        # Probabilities of the chosen experts sum to 1, unless Qwen3 says otherwise.
        "moe_router_pre_softmax": not config.to_dict().get("norm_topk_prob", True),
        "moe_router_load_balancing_type": "none",
    }


def make_stages(
    config: TransformerConfig, anatomy: MegatronModelSpec, grid: RankCoordinates
) -> list[PipelineStage]:
    """The chunks of this rank, to be filled; inside `RankCoordinates.active`."""
    virtual = grid.extents.virtual
    return [
        PipelineStage(
            config,
            anatomy,
            has_embedding=grid.stage == 0 and number == 0,
            has_head=grid.is_last and number == virtual - 1,
            number=number if virtual > 1 else None,
        )
        for number in range(virtual)
    ]
