"""Groups in a checkpoint: plain numbers, texts and a few tensors; prompts by their place in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from verl.agents.sources import Group
from verl.data.batch import Ragged, Trajectory
from verl.utils.rollout import Prompt

# What a trajectory has for each token: end to end in one tensor for all of them, as there may be hundreds of millions.
_COLUMNS = {
    "prompt_ids": torch.int32,
    "response_ids": torch.int32,
    "response_mask": torch.bool,
    "rollout_logprobs": torch.float32,
    "versions": torch.int32,
}


def saved_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups as plain data; the answers of those in flight are left out."""
    complete = [group.answers if group.arrival is not None else [] for group in groups]
    answers = [t for of_group in complete for t in of_group]
    columns = {name: Ragged.from_rows([vars(t)[name] or [] for t in answers], dtype) for name, dtype in _COLUMNS.items()}
    return {
        "groups": [_saved_group(group, len(of_group)) for group, of_group in zip(groups, complete, strict=True)],
        "answers": [_saved_answer(t) for t in answers],
        "columns": {name: (column.values, column.lengths) for name, column in columns.items()},
    }


def groups_from(saved: Mapping[str, Any], prompts: Mapping[int, Prompt]) -> list[Group]:
    """The groups that were saved.

    Args:
        saved: from `saved_groups`.
        prompts: by their index in the data.

    Raises:
        ValueError: a prompt is not in the data any more.
    """
    columns = {name: [part.tolist() for part in values.split(lengths.tolist())] for name, (values, lengths) in saved["columns"].items()}
    rows = iter(zip(saved["answers"], *(columns[name] for name in _COLUMNS), strict=True))
    groups = []
    for facts in saved["groups"]:
        facts = dict(facts)
        index, num_answers = facts.pop("prompt"), facts.pop("num_answers")
        if index not in prompts:
            raise ValueError(
                f"need the prompts that the checkpoint's groups were asked with, but row {index} is not in the data; go on with the same "
                "data.train and data.max_prompt_tokens, or take checkpoint.resume=never"
            )
        answers = [_answer(prompts[index], *next(rows)) for _ in range(num_answers)]
        groups.append(Group(prompt=prompts[index], answers=answers, **facts))
    return groups


def _saved_group(group: Group, num_answers: int) -> dict[str, Any]:
    names = ("number", "oldest", "draw", "arrival", "is_dead")
    return {name: vars(group)[name] for name in names} | {
        "prompt": group.prompt.index,
        "tries": dict(group.tries),
        "num_answers": num_answers,
    }


def _saved_answer(trajectory: Trajectory) -> dict[str, Any]:
    facts = {f.name: vars(trajectory)[f.name] for f in fields(Trajectory) if f.name != "prompt" and f.name not in _COLUMNS}
    return facts | {"has_logprobs": trajectory.rollout_logprobs is not None}


def _answer(prompt: Prompt, facts: Mapping[str, Any], *columns: list[Any]) -> Trajectory:
    values: dict[str, Any] = dict(zip(_COLUMNS, columns, strict=True))
    logprobs = values.pop("rollout_logprobs")
    rest = {name: value for name, value in facts.items() if name != "has_logprobs"}
    return Trajectory(prompt=prompt, **{**values, "rollout_logprobs": logprobs if facts["has_logprobs"] else None, **rest})
