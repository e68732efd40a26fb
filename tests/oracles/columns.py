"""Random columns of every known name, in fp64, for properties and contracts."""

from __future__ import annotations

import torch
from torch import Tensor


def random_columns(seed: int, rows: int = 6, width: int = 7) -> dict[str, Tensor]:
    """Rows of random length, with tokens of the environment in between; some rows may have no sampled token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(0, width + 1, (rows, 1), generator=g)
    present = torch.arange(width) < lengths
    mask = present & (torch.rand(rows, width, generator=g) < 0.7)
    columns = {name: normal(rows, width) for name in ("token_rewards", "values", "returns", "advantages")}
    columns["new_values"] = columns["values"] + normal(rows, width)
    columns["logprobs"] = -normal(rows, width).abs()
    for name in ("old_logprobs", "rollout_logprobs", "trainer_logprobs", "ref_logprobs"):
        columns[name] = columns["logprobs"] + 0.5 * normal(rows, width)
    columns = {name: column * present for name, column in columns.items()}
    group_ids = torch.randint(0, max(1, rows // 2), (rows,), generator=g)
    columns |= {"mask": mask, "minibatch_mask": mask, "rewards": normal(rows), "group_ids": group_ids}
    columns |= {"truncated": lengths[:, 0] == width, "versions": torch.zeros(rows, width, dtype=torch.int64)}
    columns["staleness"] = torch.randint(0, 4, (rows, width), generator=g) * present
    columns["noise"] = torch.rand(rows, width, generator=g, dtype=torch.float64)
    columns["reward_parts"] = normal(rows, 3)
    columns["reward_weights"] = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64).repeat(rows, 1)
    columns["greedy_rewards"] = normal(rows)[group_ids]
    probability = columns["trainer_logprobs"].exp().clamp(max=1)
    # At least the square of the sampled token's own, at most with all that is left on one other token.
    columns["sum_squared_probs"] = (
        probability.square() + (1 - probability).square() * torch.rand(rows, width, generator=g).double()
    )
    for name in ("prm_logprobs", "teacher_logprobs"):
        columns[name] = (columns["ref_logprobs"] + 0.5 * normal(rows, width)) * present
    teacher, student = (torch.log_softmax(normal(rows, width, 8), -1) for _ in range(2))
    columns["teacher_top_logprobs"], top = teacher.topk(3, -1)
    columns["top_logprobs"] = student.gather(-1, top)
    return columns
