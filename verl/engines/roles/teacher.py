"""The frozen teacher of a distillation as a role: writes its logprobs and its most likely tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from verl.controller.dispatch import PLANNED, register
from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import ForwardEngine
from verl.engines.hf.models import PolicyModel, target_logprobs
from verl.engines.minibatches import plan_rows
from verl.engines.roles.role_columns import response_columns, stacked_columns
from verl.engines.roles.role_worker import ColumnWorker


class TeacherWorker(ColumnWorker):
    """The frozen model that the policy is distilled from: writes its logprobs of the policy's tokens.

    Args:
        engine: runs a `PolicyModel`.
        temperature: of the sampler; 0 (greedy) counts as 1.
        chunk: tokens whose logits are in memory at a time.
        top_k: most likely tokens at each position to write, too.
    """

    def __init__(self, engine: ForwardEngine, *, temperature: float, chunk: int | None, top_k: int) -> None:
        super().__init__(engine)
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._top_k = top_k

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`teacher_logprobs`, and with a `top_k` above 0 `teacher_top_logprobs` and `teacher_top_ids`."""
        model, k = self.engine.model, self._top_k
        assert isinstance(model, PolicyModel)

        def outputs(vocab_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            top, ids = vocab_logprobs.topk(k, -1)
            # One tensor: fp32 holds every id below 2^24 exactly, more than any vocabulary has.
            return (torch.cat([target_logprobs(vocab_logprobs, targets)[:, None], top, ids.float()], 1),)

        def stacked(inputs: ModelInput) -> Tensor:
            temperature, chunk = self._temperature, self._chunk
            return model.reduce_vocab(inputs, outputs, temperature=temperature, chunk=chunk)[0]

        written = stacked_columns(self.engine.infer(batch, plan_rows(plan), stacked), batch, 1 + 2 * k)
        columns = {"teacher_logprobs": written[..., 0]}
        if k:
            columns["teacher_top_logprobs"] = written[..., 1 : k + 1]
            columns["teacher_top_ids"] = written[..., k + 1 :].long()
        return response_columns(batch, columns)
