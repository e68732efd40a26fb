"""What verl adds to the processes of vLLM before 0.25: the steps of an update that later versions have
themselves.

vLLM finds it by `--worker-extension-cls`.
"""

from __future__ import annotations

from typing import Any

import torch

from verl.rollout.vllm import worker
from verl.rollout.vllm.versions import control
from verl.rollout.vllm.worker import ChunkEngine


class LegacyChunkEngine(ChunkEngine):
    """The engine as later versions of vLLM make it, made of a worker: these would give it other arguments, or
    refuse it.
    """

    def __init__(self, worker: LegacyWorkerExtension) -> None:
        self.vllm_config = worker.vllm_config
        self.parallel_config, self.model_config = (
            self.vllm_config.parallel_config,
            self.vllm_config.model_config,
        )
        # A worker for CPUs has no device of its own in some of them.
        self.device, self.model = worker.model_runner.device, worker.model_runner.get_model()


class LegacyWorkerExtension(worker.WorkerExtension):
    """See there; and a method for each step of an update, of the same name and arguments as vLLM's own from
    0.25 on.
    """

    # Of the worker that this becomes a part of.
    vllm_config: Any
    model_runner: Any

    def verl_place(self) -> dict[str, Any]:
        """See there, and whether kept answers lose tokens here."""
        needed = control(worker.vllm.__version__)
        loses_tokens = "async-scheduling" in needed and bool(
            self.vllm_config.scheduler_config.async_scheduling
        )
        return {**super().verl_place(), "loses_tokens": loses_tokens}

    def verl_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the process group that carries the weights."""
        engine = self._verl_engine()
        engine.init_transfer_engine(engine.parse_init_info(init_info))

    def verl_start_weight_update(self) -> None:
        """See `ChunkEngine.start_weight_update`; one before that did not end is undone."""
        with torch.device(self.model_runner.device):
            self._verl_engine().start_weight_update()

    def verl_update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk of the weights."""
        with torch.device(self.model_runner.device):
            self._verl_engine().update_weights(update_info)

    def verl_finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `ChunkEngine.finish_weight_update`; these versions have no name for their weights."""
        with torch.device(self.model_runner.device):
            self._verl_engine().finish_weight_update()

    def _verl_engine(self) -> ChunkEngine:
        """Ours, kept where the worker would have its own, so that it ends with it."""
        if not isinstance(self.weight_transfer_engine, ChunkEngine):
            self.weight_transfer_engine = LegacyChunkEngine(self)
        return self.weight_transfer_engine
