"""Prediction of a measured run by the modelled cluster: one engine and one trainer, each on its own core.

The seconds of the parts of a step come from the side that does not run ahead, in which no two parts overlap.
The throughput of the other sides is predicted from them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import Cluster, Plan
from modelled_engines import Lengths, Pace

from verl.config.pipeline import PipelineConfig

_BASE, _AHEAD = "ahead 0", "ahead "
_STEPS, _WARMUP = 40, 10


@dataclass(frozen=True)
class PartSeconds:
    """Seconds of the parts of a step.

    Attributes:
        generation_s: for the answers of a batch, all at once; more answers take longer in proportion, as on a
            CPU.
        training_s: training on a batch, and all other parts.
        write_s: until the weights can be loaded.
        load_s: for which the engine is paused.
    """

    generation_s: float
    training_s: float
    write_s: float
    load_s: float

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]]) -> PartSeconds:
        """Medians over steps of a side that does not run ahead, from their `wall` seconds and phases."""
        rest = [
            step["wall"] - step["wait_training"] - step["sync_write"] - step["sync_load"] for step in steps
        ]
        parts = [
            statistics.median(step[name] for step in steps)
            for name in ("wait_training", "sync_write", "sync_load")
        ]
        return cls(parts[0], statistics.median(rest), parts[1], parts[2])


def step_s(seconds: PartSeconds, max_staleness: int, *, prompts: int = 8, samples: int = 8) -> float:
    """Mean seconds of a step of the real pipeline over one modelled engine, after a warm-up."""
    num_answers, tokens = prompts * samples, 16
    pace = Pace(
        0.0,
        seconds.generation_s / (tokens * num_answers),
        0.0,
        0.0,
        num_answers * (max_staleness + 2),
        seconds.load_s,
        0.0,
    )
    plan = Plan(
        devices=2,
        generation=1,
        prompts_per_step=prompts,
        samples=samples,
        train_s=seconds.training_s / 2,
        write_s=seconds.write_s,
        config=PipelineConfig(max_staleness=max_staleness),
        steps=_STEPS,
        warmup=_WARMUP,
        pace=pace,
        lengths=Lengths(mean=float(tokens), sigma=0.0, longest=tokens, prompt=1, block=1),
    )
    return 3600.0 / Cluster(plan).figures().updates_per_h


def steps_of(side: str, measured: Mapping[str, Any], *, warmup: int = 2) -> list[dict[str, float]]:
    """Steps of a side in a file of `asynchrony.py`, without the first burst and the warm-up of each."""
    steps, number = [], 0
    for i, burst in enumerate(measured["bursts"][side]):
        for j, wall_s in enumerate(burst["wall_s"]):
            if i and j >= warmup:
                steps.append({"wall": wall_s, **measured["reports"][side]["steps"][number]["phases"]})
            number += 1
    return steps


def compared(results: Mapping[str, Any]) -> str:
    """Table of predictions and measurements.

    Raises:
        ValueError: the side that does not run ahead was not measured.
    """
    lines = [
        "| workload | seconds of generation, training, write, load | side | predicted updates/s | measured "
        "| predicted / measured |",
        "| --- |" + " --- |" * 5,
    ]
    for workload, measured in results.items():
        if _BASE not in measured["bursts"]:
            raise ValueError(
                f"need the side {_BASE!r} of {workload}, got {', '.join(measured['bursts'])}; "
                "add it to --sides of asynchrony.py"
            )
        seconds = PartSeconds.of(steps_of(_BASE, measured))
        parts = ", ".join(f"{part:.3f}" for part in vars(seconds).values())
        for side in measured["bursts"]:
            if not side.removeprefix(_AHEAD).isdigit():
                continue
            predicted = 1 / step_s(seconds, int(side.removeprefix(_AHEAD)))
            got = 1 / statistics.median(step["wall"] for step in steps_of(side, measured))
            lines.append(
                f"| {workload} | {parts} | {side} | {predicted:.2f} | {got:.2f} | {predicted / got:.2f} |"
            )
    return "\n".join(lines)
