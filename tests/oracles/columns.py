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
    columns |= {"mask": mask, "rewards": normal(rows), "group_ids": group_ids}
    return columns | {"truncated": lengths[:, 0] == width, "versions": torch.zeros(rows, width, dtype=torch.int64)}
