"""Groups in a checkpoint: plain numbers, texts and a few tensors; prompts by their place in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.agents.groups import Group
from verl.data.trajectory import EpisodeRecord, Segment, Trajectory
from verl.utils.sampling_types import Prompt

# Values per token, of which there may be hundreds of millions: one array for all trajectories.
_COLUMNS: dict[str, type] = {"prompt_ids": np.int32, "response_ids": np.int32, "rollout_logprobs": np.float32}
# Values that are equal for many tokens in a row: run-length encoded.
_RUNS = ("response_mask", "versions", "states")


def saved_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups as plain data, without the answers of groups in flight."""
    complete = [group.answers if group.arrival is not None else [] for group in groups]
    answers = [t for of_group in complete for t in of_group]
    return {
        "groups": [
            _saved_group(group, len(of_group)) for group, of_group in zip(groups, complete, strict=True)
        ],
        "answers": [_saved_answer(t) for t in answers],
        "columns": {name: _column([vars(t)[name] for t in answers], kind) for name, kind in _COLUMNS.items()},
    }


def groups_from(saved: Mapping[str, Any], prompts: Mapping[int, Prompt]) -> list[Group]:
    """Groups from plain data.

    Args:
        saved: from `saved_groups`.
        prompts: by their index in the data.

    Raises:
        ValueError: a prompt is not in the data any more.
    """
    columns = {
        name: iter(values.split(lengths.tolist())) for name, (values, lengths) in saved["columns"].items()
    }
    rows = iter(saved["answers"])
    groups = []
    for facts in saved["groups"]:
        facts = dict(facts)
        index, num_answers = facts.pop("prompt"), facts.pop("num_answers")
        if index not in prompts:
            raise ValueError(
                f"need the prompts of the checkpoint's groups, but row {index} is not in the data; go on "
                "with the same "
                "data.train and data.max_prompt_tokens, or take checkpoint.resume=never"
            )
        answers = [
            _answer(prompts[index], next(rows), {name: next(columns[name]) for name in _COLUMNS})
            for _ in range(num_answers)
        ]
        groups.append(Group(prompt=prompts[index], answers=answers, **facts))
    return groups


def _saved_group(group: Group, num_answers: int) -> dict[str, Any]:
    names = ("number", "oldest", "attempt", "arrival", "has_no_signal")
    return {name: vars(group)[name] for name in names} | {
        "prompt": group.prompt.index,
        "tries": dict(group.tries),
        "num_answers": num_answers,
    }


def _saved_answer(trajectory: Trajectory) -> dict[str, Any]:
    facts = {
        f.name: vars(trajectory)[f.name]
        for f in fields(Trajectory)
        if f.name not in ("prompt", *_COLUMNS, *_RUNS)
    }
    runs = {
        name: [(value, sum(1 for _ in run)) for value, run in groupby(vars(trajectory)[name])]
        for name in _RUNS
    }
    facts["earlier"] = [vars(segment) for segment in trajectory.earlier]
    facts["episode"] = None if trajectory.episode is None else vars(trajectory.episode)
    return {**facts, **runs, "has_logprobs": trajectory.rollout_logprobs is not None}


def _answer(prompt: Prompt, saved: Mapping[str, Any], columns: Mapping[str, Tensor]) -> Trajectory:
    facts = dict(saved)
    facts |= {name: [value for value, count in facts[name] for _ in range(count)] for name in _RUNS}
    has_logprobs = facts.pop("has_logprobs")
    facts |= {
        name: column.tolist() if name != "rollout_logprobs" or has_logprobs else None
        for name, column in columns.items()
    }
    facts["earlier"] = [Segment(**segment) for segment in facts.get("earlier", ())]
    facts["episode"] = EpisodeRecord(**facts["episode"]) if facts.get("episode") else None
    return Trajectory(prompt=prompt, **facts)


def _column(rows: Sequence[Any], kind: type) -> tuple[Tensor, Tensor]:
    """Values end to end, and the number in each row; a remote row is fetched in one piece."""
    parts: list[Any] = [np.asarray([] if row is None else row[:], dtype=kind) for row in rows]
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    return torch.from_numpy(np.concatenate([np.empty(0, kind), *parts])), lengths
