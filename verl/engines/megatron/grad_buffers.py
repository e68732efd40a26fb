"""Gradient buffers of a Megatron-Core model, reduced over data ranks in or after the last backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class GradBuffers:
    """Gradients in fp32 of the model chunks on this rank.

    Args:
        chunks: of the model.
        config: Megatron-Core's, of the model; its schedule reduces gradients by functions in it.
        bucket_size: parameters whose gradients are reduced together; None: Megatron-Core's default.
        overlap: reduce a bucket as soon as it is full, during the last backward pass.

    Attributes:
        chunks: the model chunks with gradient buffers, as the schedule runs them.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        config: TransformerConfig,
        *,
        bucket_size: int | None,
        overlap: bool,
    ) -> None:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            bucket_size=bucket_size,
            overlap_grad_reduce=overlap,
        )
        self.chunks = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        self._config = config
        self._overlap = overlap
        no_sync = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.finalize_model_grads_func = _reduce

    def zero(self) -> None:
        """Set all gradients to 0, for the next update."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Context in which gradients stay local to this rank, until `reduce` is called after it."""
        functions = self._config.no_sync_func, self._config.finalize_model_grads_func
        # A gradient that was reduced already and then grows could not be reduced again.
        self._config.no_sync_func = self._config.finalize_model_grads_func = None
        try:
            with ExitStack() as contexts:
                for chunk in self.chunks:
                    contexts.enter_context(chunk.no_sync())
                yield
        finally:
            self._config.no_sync_func, self._config.finalize_model_grads_func = functions

    def reduce(self) -> None:
        """Sum gradients over data ranks, tied weights and sequence parallel ranks; once per update."""
        # With overlap Megatron-Core expects that the backward pass has started the communication.
        for chunk in self.chunks if self._overlap else ():
            chunk.start_grad_sync()
        _reduce(list(self.chunks))

    def scale(self, factor: float) -> None:
        """Multiply all gradients by a factor."""
        for chunk in self.chunks:
            chunk.scale_gradients(factor)


def _reduce(chunks: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron-Core's reduction without its division by tokens: the loss has its denominator already."""
    finalize_model_grads(chunks, None, **options)
