"""The gradients of a model of Megatron-Core, in buffers that data ranks sum: with the last backward pass of
an update, or after it.
"""

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
    """Gradients in fp32 of the chunks of a model on this rank.

    Args:
        chunks: of the model.
        config: of the model, as Megatron-Core has it; its schedule sums gradients over data ranks through it.
        bucket_size: parameters whose gradients are summed together; None: Megatron-Core's own.
        overlap: sum a bucket as soon as it is full, while the last backward pass goes on.

    Attributes:
        replicated: the chunks as the schedule runs them.
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
        self.replicated = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        self._config = config
        self._overlap = overlap
        no_sync = [chunk.no_sync for chunk in self.replicated]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.finalize_model_grads_func = _summed

    def zero(self) -> None:
        """For the next update."""
        for chunk in self.replicated:
            chunk.zero_grad_buffer()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the schedule adds to the gradients of this rank and leaves them so; then `sum`."""
        schedule = self._config.no_sync_func, self._config.finalize_model_grads_func
        # A sum over ranks that each adds more to could not be summed again.
        self._config.no_sync_func = self._config.finalize_model_grads_func = None
        try:
            with ExitStack() as unsummed:
                for chunk in self.replicated:
                    unsummed.enter_context(chunk.no_sync())
                yield
        finally:
            self._config.no_sync_func, self._config.finalize_model_grads_func = schedule

    def sum(self) -> None:
        """Over data ranks, tied weights and shared places; on all ranks together, once for an update."""
        for chunk in self.replicated if self._overlap else ():
            chunk.start_grad_sync()
        _summed(list(self.replicated))

    def scale(self, factor: float) -> None:
        """Multiplies all of them."""
        for chunk in self.replicated:
            chunk.scale_gradients(factor)


def _summed(chunks: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Gradients summed over data ranks, tied weights and shared places; a loss has its denominator already."""
    finalize_model_grads(chunks, None, **options)
