"""Extension of vLLM's worker processes before 0.25, with the steps of an update that later versions have.

vLLM imports this module by `--worker-extension-cls`.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from verl.rollout.vllm import worker
from verl.rollout.vllm.versions import weight_options
from verl.rollout.vllm.worker import ChunkTransferEngine


class LegacyChunkTransferEngine(ChunkTransferEngine):
    """Transfer engine built from a worker: these versions pass other arguments to it, or refuse it."""

    def __init__(self, worker: LegacyWorkerExtension) -> None:
        self.vllm_config = worker.vllm_config
        self.parallel_config = self.vllm_config.parallel_config
        self.model_config = self.vllm_config.model_config
        # In some versions a worker for CPUs has no device of its own.
        self.device, self.model = worker.model_runner.device, worker.model_runner.get_model()


class LegacyWorkerExtension(worker.WorkerExtension):
    """`WorkerExtension` with a method for each step of an update, named as vLLM's own from 0.25 on."""

    # Attributes of vLLM's worker, which must have no method of the names below.
    vllm_config: Any
    model_runner: Any

    @override
    def verl_describe(self) -> dict[str, Any]:
        # With asynchronous scheduling, some versions lose a token of each answer that is kept over an update.
        needs_sync = "async-scheduling" in weight_options(worker.vllm.__version__)
        loses_tokens = needs_sync and bool(self.vllm_config.scheduler_config.async_scheduling)
        return {**super().verl_describe(), "loses_tokens": loses_tokens}

    def verl_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the process group that carries the weights."""
        engine = self._verl_engine()
        engine.init_transfer_engine(engine.parse_init_info(init_info))

    def verl_start_weight_update(self) -> None:
        """Begin an update; an unfinished earlier one is undone."""
        with torch.device(self.model_runner.device):
            self._verl_engine().start_weight_update()

    def verl_update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk of the weights."""
        with torch.device(self.model_runner.device):
            self._verl_engine().update_weights(update_info)

    def verl_finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use the new weights; these versions have no name for them, so the argument is ignored."""
        with torch.device(self.model_runner.device):
            self._verl_engine().finish_weight_update()

    def _verl_engine(self) -> ChunkTransferEngine:
        """Our transfer engine, kept in the place of vLLM's own so that it is shut down with the worker."""
        if not isinstance(self.weight_transfer_engine, ChunkTransferEngine):
            self.weight_transfer_engine = LegacyChunkTransferEngine(self)
        return self.weight_transfer_engine
