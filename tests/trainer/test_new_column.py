"""A new column reaches a user's advantage and loss: it takes a row of the table and a function."""

from __future__ import annotations

import pytest
import torch

from tests.training import toy_trainer
from verl.algorithms.objective import STEP_COLUMNS
from verl.data.batch import TRAJECTORY_COLUMNS
from verl.data.columns import COLUMNS, REAL, ColumnSpec
from verl.engines.roles.policy import POLICY_COLUMNS

SEEN: list[torch.Tensor] = []


def reads_the_new_column(rewards, mask, new_column):
    """A user's advantage."""
    SEEN.append(new_column)
    return rewards[:, None] * mask + new_column


def learns_from_the_new_column(logprobs, advantages, new_column):
    """A user's policy loss."""
    SEEN.append(new_column)
    return -logprobs * advantages * new_column, {"new_column": new_column}


NEW = {
    "policy": (POLICY_COLUMNS, "B T", lambda log_probs, targets: log_probs.amax(-1).exp()),
    "step": (STEP_COLUMNS, "B T", lambda batch, version, seed: 0.5 + 0 * batch["mask"].float()),
    "sampler": (TRAJECTORY_COLUMNS, "B T", lambda trajectory: [0.25] * len(trajectory.response_ids)),
}


@pytest.mark.parametrize("writer", NEW)
def test_a_new_column_is_a_row_of_the_table_and_its_function(writer, letters, tmp_path, monkeypatch):
    functions, shape, function = NEW[writer]
    monkeypatch.setitem(COLUMNS, "new_column", ColumnSpec("new_column", shape, REAL, writer, "of a test"))
    monkeypatch.setitem(functions, "new_column", function)
    chosen = [f"algorithm.advantage={__name__}:reads_the_new_column"]
    chosen.append(f"algorithm.policy_loss={__name__}:learns_from_the_new_column")
    trainer = toy_trainer("grpo", letters, tmp_path, *chosen)
    SEEN.clear()
    metrics = trainer.step()
    values = torch.cat([column[column != 0] for column in SEEN])
    assert len(SEEN) > 1 and 0 < metrics["new_column"] <= 1 and ((values > 0) & (values <= 1)).all()


def test_the_teachers_most_likely_tokens_reach_the_update(letters, tmp_path):
    settings = ["algorithm.policy_loss=forward_kl_topk", "teacher.top_k=3"]
    trainer = toy_trainer("distillation", letters, tmp_path, *settings)
    assert trainer.step()["grad_norm"] >= 0
