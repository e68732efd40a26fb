"""The critic as a role: writes the values of the response tokens and is trained by the value loss."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, register
from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import Objective, TrainEngine
from verl.engines.hf.models import ValueModel
from verl.engines.minibatches import plan_rows
from verl.engines.roles.role_columns import critic_reads, pad_response, read_columns, response_columns
from verl.engines.roles.role_worker import Learner


class CriticWorker(Learner):
    """The critic: writes `values` and is trained; its metrics begin with `critic/`.

    Args:
        engine: trains a `ValueModel`.
        algorithm: defines the value loss.
        vf_coef: factor of the value loss.
        epochs: passes over the rows of a step.
    """

    _prefix = "critic/"

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, vf_coef: float, epochs: int) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        self._vf_coef = vf_coef
        self._reads = critic_reads(algorithm)

    @property
    def model(self) -> ValueModel:
        """The value model."""
        assert isinstance(self.engine.model, ValueModel)
        return self.engine.model

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`values` of the states before each response token."""
        values = self.engine.infer(batch, plan_rows(plan), self.model.token_values)
        return response_columns(batch, {"values": values})

    @override
    def objective(self, kl_coef: float) -> Objective:
        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            values = pad_response(self.model.token_values(inputs), inputs)
            columns = read_columns(rows, self._reads, values.device) | {"new_values": values}
            return self._algorithm.value_objective(columns, self._vf_coef)

        return objective
