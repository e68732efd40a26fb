"""Micro-batches through the pipeline stages of a model, by Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from verl.data.batch import Batch, ModelInput
from verl.engines.base import dummy_batch
from verl.engines.megatron.model import MegatronPolicy, MegatronValue, PackedSequence
from verl.engines.megatron.parallel_dims import RankCoordinates

# A function of a micro-batch that the last stage evaluates: row numbers, rows and model input -> result. It
# returns the loss in training.
Evaluate = Callable[[Sequence[int], Batch, ModelInput], Any]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        rows: their numbers in the batch; none for a dummy micro-batch.
        batch: the rows; one token for a dummy micro-batch.
        inputs: the rows as model input.
        packed: the same as one padded sequence, or this rank's slice of it.
    """

    rows: Sequence[int]
    batch: Batch
    inputs: ModelInput
    packed: PackedSequence


class PipelineSchedule:
    """Runs the micro-batches of a batch forward, or forward and backward, through all stages of a model.

    Args:
        model: on the last stage it gets the final states of each micro-batch.
        chunks: its model chunks on this rank, as Megatron-Core runs them.
        coordinates: of this rank.
        config: Megatron-Core's, of the model.
    """

    def __init__(
        self,
        model: MegatronPolicy | MegatronValue,
        chunks: Sequence[nn.Module],
        *,
        coordinates: RankCoordinates,
        config: TransformerConfig,
    ) -> None:
        self._model, self._chunks = model, list(chunks)
        self._coordinates, self._config = coordinates, config

    def run(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], evaluate: Evaluate, *, forward_only: bool
    ) -> None:
        """Run all micro-batches; a collective call, inside `RankCoordinates.active`.

        Args:
            batch: the rows of this rank.
            micro_batches: row numbers; equally many on all ranks, of which some may be empty.
            evaluate: called on the last stage for each micro-batch, with the model's states set.
            forward_only: False to run backward as well, from the result of `evaluate`.
        """
        prepared = self._prepare(batch, list(micro_batches) or [[]])
        is_interleaved = len(self._chunks) > 1

        def forward_step(
            micro_batches: Iterator[MicroBatch], chunk: nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            micro = next(micro_batches)
            packed = micro.packed
            states = chunk(packed.input_ids, packed.position_ids, None, packed_seq_params=packed.params)

            def loss_function(states: Tensor, non_loss_data: bool = False) -> Any:
                result = self._evaluate(evaluate, micro, states)
                # Megatron-Core expects loss, number of tokens and a report. The loss has its denominator
                # already, so the number is not used.
                num_tokens = torch.zeros((), dtype=torch.int, device=states.device)
                return result if non_loss_data else (result, num_tokens, {})

            return states, loss_function

        num_chunks = len(self._chunks) if is_interleaved else None
        run = get_forward_backward_func(self._coordinates.sizes.pipeline, num_chunks)
        run(
            forward_step_func=forward_step,
            data_iterator=[iter(prepared) for _ in self._chunks] if is_interleaved else iter(prepared),
            model=self._chunks if is_interleaved else self._chunks[0],
            num_microbatches=len(prepared),
            seq_length=prepared[0].packed.num_places,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _prepare(self, batch: Batch, micro_batches: list[Sequence[int]]) -> list[MicroBatch]:
        """The micro-batches as every stage reads them."""
        sizes = self._coordinates.sizes
        is_interleaved = sizes.virtual_pipeline > 1
        if is_interleaved:
            # Interleaved stages run micro-batches in groups, so the last group is filled up.
            group = self._config.microbatch_group_size_per_vp_stage or sizes.pipeline
            micro_batches = micro_batches + [[]] * (-len(micro_batches) % group)
        batches = [batch.select(rows) if rows else dummy_batch() for rows in micro_batches]
        inputs = [ModelInput.from_batch(micro, packed=True, device=self._model.device) for micro in batches]
        multiple = sizes.tensor * sizes.context
        lengths = [-(-each.input_ids.shape[1] // multiple) * multiple for each in inputs]
        # Interleaved stages exchange tensors of one shape.
        lengths = [max(lengths)] * len(lengths) if is_interleaved else lengths
        packed = [
            PackedSequence.from_inputs(each, self._coordinates.sequence, length)
            for each, length in zip(inputs, lengths, strict=True)
        ]
        return [MicroBatch(*parts) for parts in zip(micro_batches, batches, inputs, packed, strict=True)]

    def _evaluate(self, evaluate: Evaluate, micro: MicroBatch, states: Tensor) -> Any:
        self._model.packed, self._model.states = micro.packed, states
        try:
            return evaluate(micro.rows, micro.batch, micro.inputs)
        finally:
            # The graph of the states is freed with the micro-batch.
            del self._model.states
