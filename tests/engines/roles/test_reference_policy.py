"""The reference writes the logprobs of the policy before training."""

from __future__ import annotations

import torch

from tests.engines.roles.workers import ONE_BY_ONE, WHOLE, policy
from tests.training import local_engine, rows_to_learn
from verl.engines.roles.reference_policy import ReferenceWorker


def test_the_reference_writes_what_the_policy_wrote_at_the_start():
    batch, worker = rows_to_learn(), policy()
    batch.update(ReferenceWorker(local_engine(), temperature=1.0, chunk=100).write(batch, ONE_BY_ONE))
    batch.update(worker.write(batch, WHOLE))
    torch.testing.assert_close(batch["ref_logprobs"], batch["trainer_logprobs"], rtol=1e-5, atol=1e-5)
