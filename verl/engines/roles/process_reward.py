"""The implicit process reward model as a role: writes its logprobs and is trained on the outcomes."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, register
from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import Objective, TrainEngine
from verl.engines.hf.models import PolicyModel
from verl.engines.roles.role_columns import (
    critic_reads,
    pad_response,
    policy_logprobs,
    read_columns,
    response_columns,
)
from verl.engines.roles.role_worker import Learner


class ProcessRewardWorker(Learner):
    """The implicit process reward model, a language model: writes `prm_logprobs` and is trained.

    Its metrics begin with `critic/`, since it takes the place of a critic.

    Args:
        engine: trains a `PolicyModel`.
        algorithm: defines the value loss.
        temperature: of the sampler; 0 (greedy) counts as 1.
        epochs: passes over the rows of a step.
        chunk: tokens whose logits are in memory at a time.
    """

    _prefix = "critic/"

    def __init__(
        self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int | None
    ) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._reads = critic_reads(algorithm)

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`prm_logprobs` of the response tokens."""
        logprobs = policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk)
        return response_columns(batch, {"prm_logprobs": logprobs})

    @override
    def objective(self, kl_coef: float) -> Objective:
        model = self.engine.model
        assert isinstance(model, PolicyModel)

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, _ = model.token_logprobs(inputs, temperature=self._temperature, chunk=self._chunk)
            columns = read_columns(rows, self._reads, logprobs.device)
            columns["prm_logprobs"] = pad_response(logprobs, inputs)
            return self._algorithm.value_objective(columns, 1.0)

        return objective
