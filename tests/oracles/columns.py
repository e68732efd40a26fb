"""Random columns of the shape, type and bounds that the table of columns gives, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from verl.data.columns import CHOSEN, COLUMNS, LOGPROB, ColumnSpec, readable_by


def random_columns(seed: int, rows: int = 6, width: int = 7) -> dict[str, Tensor]:
    """Rows of random length with some tokens of the environment; a row may have no sampled token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(0, width + 1, (rows, 1), generator=g)
    present = torch.arange(width) < lengths
    sizes = {"B": rows, "T": width, "K": 3, "k": 3}
    common = -normal(rows, width).abs()
    columns = {}
    for name in readable_by(*CHOSEN):
        spec = COLUMNS[name]
        column = random_values(spec, [sizes[axis] for axis in spec.axes], g)
        if spec.values == LOGPROB and spec.axes == ("B", "T"):
            # All models are near each other, so that ratios stay small; a difference may have either sign.
            column = common + 0.5 * normal(rows, width) if name != "logprobs" else common
        columns[name] = column * present if spec.axes == ("B", "T") and column.is_floating_point() else column
    mask = present & (torch.rand(rows, width, generator=g) < 0.7)
    group_ids = torch.randint(0, max(1, rows // 2), (rows,), generator=g)
    columns |= {"mask": mask, "minibatch_mask": mask, "group_ids": group_ids}
    columns["truncated"] = lengths[:, 0] == width
    columns["new_values"] = columns["values"] + normal(rows, width) * present
    columns["reward_weights"] = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64).repeat(rows, 1)
    columns["greedy_rewards"] = columns["greedy_rewards"][group_ids]
    probability = columns["trainer_logprobs"].exp().clamp(max=1)
    # At least the square of the sampled token's own, at most with all that is left on one other token.
    columns["sum_squared_probs"] = (
        probability.square() + (1 - probability).square() * columns["sum_squared_probs"]
    )
    teacher, student = (torch.log_softmax(normal(rows, width, 8), -1) for _ in range(2))
    columns["teacher_top_logprobs"], top = teacher.topk(3, -1)
    columns["top_logprobs"] = student.gather(-1, top)
    return columns


def random_values(spec: ColumnSpec, shape: list[int], generator: torch.Generator) -> Tensor:
    """Random values of the type and bounds of a column, floating point in fp64."""
    values = spec.values
    if values.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if values.dtype == torch.int64:
        return torch.randint(0, 4, shape, generator=generator)
    if values.high == 1:
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return -normal.abs() if values.high == 0 else normal
