"""The frozen reference policy as a role: writes its logprobs."""

from __future__ import annotations

from verl.controller.dispatch import PLANNED, register
from verl.data.batch import Batch
from verl.data.packing import BatchPlan
from verl.engines.base import ForwardEngine
from verl.engines.roles.role_columns import policy_logprobs, response_columns
from verl.engines.roles.role_worker import ColumnWorker


class ReferenceWorker(ColumnWorker):
    """The frozen policy that the KL term refers to: writes `ref_logprobs`.

    Args:
        engine: runs a `PolicyModel`.
        temperature: of the sampler; 0 (greedy) counts as 1.
        chunk: tokens whose logits are in memory at a time.
    """

    def __init__(self, engine: ForwardEngine, *, temperature: float, chunk: int | None) -> None:
        super().__init__(engine)
        self._temperature = temperature or 1.0
        self._chunk = chunk

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`ref_logprobs` of the response tokens."""
        logprobs = policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk)
        return response_columns(batch, {"ref_logprobs": logprobs})
