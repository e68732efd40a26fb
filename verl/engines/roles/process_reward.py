"""The implicit process reward model as a role: writes its logprobs and is trained by outcomes."""

from __future__ import annotations

from torch import Tensor

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, register
from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import Objective, TrainEngine
from verl.engines.hf.models import PolicyModel
from verl.engines.roles.base import Learner
from verl.engines.roles.columns import (
    critic_reads,
    pad_response,
    policy_logprobs,
    read_columns,
    response_columns,
)


class ProcessRewardWorker(Learner):
    """The implicit process reward model, a language model: writes `prm_logprobs`, and learns from outcomes,
    as a critic does.
    """

    _prefix = "critic/"

    def __init__(
        self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int
    ) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._reads = critic_reads(algorithm)

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`prm_logprobs`."""
        logprobs = policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk)
        return response_columns(batch, {"prm_logprobs": logprobs})

    def _objective(self, kl_coef: float) -> Objective:
        model = self.engine.model
        assert isinstance(model, PolicyModel)

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = pad_response(
                model.token_logprobs(inputs, temperature=self._temperature, chunk=self._chunk)[0], inputs
            )
            columns = read_columns(rows, self._reads, logprobs.device) | {"prm_logprobs": logprobs}
            return self._algorithm.value_objective(columns, 1.0)

        return objective
