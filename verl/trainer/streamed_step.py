"""A step that is learned from while its last groups are answered: writers, advantages and gradients of each
portion as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from verl.algorithms.objective import Algorithm, write_advantages
from verl.config.run import TrainerConfig
from verl.controller.worker_group import WorkerGroup
from verl.data.batch import Batch
from verl.engines.roles.base import Learner
from verl.engines.streaming import StreamedBatch, StreamedUpdate, streaming_obstacle
from verl.trainer.base import Metrics

# Names of the roles that learn, in the order in which they do.
CRITIC, POLICY = "critic", "policy"


@dataclass
class StreamedStep:
    """One step in portions; see `verl.engines.streaming`.

    Attributes:
        algorithm: what is minimised.
        write: adds the columns to rows that a chosen function reads.
        updates: of the roles that learn, by name.
        num_groups: of the step.
        kl_coef: weight of the KL.
        version: of the policy.
        seed: of the run.
    """

    algorithm: Algorithm
    write: Callable[[Batch], None]
    updates: Mapping[str, StreamedUpdate]
    num_groups: int
    kl_coef: float
    version: int
    seed: int
    portions: StreamedBatch = field(init=False)

    def __post_init__(self) -> None:
        self.portions = StreamedBatch(self.algorithm, num_groups=self.num_groups)

    def add(self, rows: Batch) -> None:
        """Begins to learn from whole groups."""
        self.write(rows)
        write_advantages(rows, self.algorithm, self.kl_coef, version=self.version, seed=self.seed)
        first_row = self.portions.add(rows)
        for update in self.updates.values():
            update.add(rows, first_row)

    def finish(self) -> Metrics:
        """Makes the updates."""
        metrics = self.portions.metrics(self.kl_coef, version=self.version)
        scales = {CRITIC: self.portions.critic_scale, POLICY: self.portions.policy_scale}
        for future in [update.finish(scales[role]) for role, update in self.updates.items()]:
            metrics |= future.result()
        return metrics


def check_streamed(algorithm: Algorithm, config: TrainerConfig, learning: Sequence[WorkerGroup]) -> None:
    """Refuses to stream what cannot be.

    Raises:
        ValueError: the algorithm needs all rows of a step at once, or an engine takes whole updates only.
    """
    if config.pipeline.batches != "streamed":
        return
    reason = streaming_obstacle(algorithm, config.algorithm)
    if reason is None and not all(group.call(Learner.can_accumulate).result() for group in learning):
        reason = "an engine of placement takes whole updates only"
    if reason:
        raise ValueError(
            f"need a step that may come in portions for pipeline.batches=streamed, but {reason}; set arrival, or change it"
        )
