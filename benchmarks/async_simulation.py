"""Throughput of a cluster by the bound on staleness: the real pipeline on virtual time, modelled engines.

All schedules have the same devices. "In turn", all devices generate and then all train. In the others some
generate while the rest trains; their number is the best that a search in steps of 5% finds on a smaller
cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from async_prediction import compared
from cluster import Cluster, Figures, Plan
from matplotlib.figure import Figure
from modelled_engines import Lengths, Pace

from verl.config.pipeline import PipelineConfig
from verl.rollout.pool.inference_pool import OnUpdate

# Shares of the devices that may generate, in units of 5%, and the one at which the search begins.
_PARTS, _FIRST_PART = range(1, 20), 12


@dataclass(frozen=True)
class Schedule:
    """A schedule of generation and training.

    Attributes:
        name: human-readable.
        max_staleness, batches: of the pipeline.
        on_update: of the inference pool.
        oversample: groups in flight beyond those that are needed, as a share of those.
        in_turn: all devices generate, then all train.
    """

    name: str
    max_staleness: int = 0
    batches: str = "arrival"
    on_update: OnUpdate = "keep"
    oversample: float = 0.0
    in_turn: bool = False

    def plan(self, base: Plan, part: int | None) -> Plan:
        """Plan of a cluster with `part` of 20 parts of its devices for engines."""
        config = PipelineConfig(
            max_staleness=self.max_staleness,
            batches=self.batches,  # type: ignore[arg-type]
            oversample=round(self.oversample * base.prompts_per_step),
        )
        # Groups that begin together are due together, `max_staleness` steps later: batches come fast until
        # one waits for its slowest answers. So only whole rounds are counted, after two rounds of warm-up.
        round_steps = self.max_staleness + 1
        warmup, counted = 2 * round_steps, round_steps * math.ceil(base.steps / round_steps)
        generation = None if part is None else max(1, min(base.devices - 1, round(base.devices * part / 20)))
        return replace(
            base,
            generation=generation,
            config=config,
            on_update=self.on_update,
            steps=warmup + counted,
            warmup=warmup,
        )


SCHEDULES = (
    Schedule("in turn", in_turn=True),
    Schedule("in turn, oversampled by 1/4", oversample=0.25, in_turn=True),
    Schedule("two pools, on-policy"),
    Schedule("two pools, on-policy, streamed", batches="streamed"),
    Schedule("one step off", 1),
    Schedule("one step off, streamed", 1, "streamed"),
    Schedule("one step off, deterministic", 1, "deterministic"),
    *(Schedule(f"ahead {bound}, keep", bound) for bound in (2, 4, 8)),
    *(Schedule(f"ahead {bound}, recompute", bound, on_update="recompute") for bound in (4, 8)),
    *(Schedule(f"ahead {bound}, abort", bound, on_update="abort") for bound in (2, 4)),
    Schedule("ahead 4, deterministic", 4, "deterministic"),
    Schedule("ahead 4, keep, streamed", 4, "streamed"),
    Schedule("ahead 4, keep, oversampled by 1/4", 4, oversample=0.25),
)


@dataclass(frozen=True)
class Row:
    """Result of a schedule.

    Attributes:
        way: name of the schedule.
        generation: devices with engines; None: all, in turn with training.
        figures: of the run.
        cpu_s: of the simulation, without the search.
    """

    way: str
    generation: int | None
    figures: Figures
    cpu_s: float


def base_plan(
    devices: int, *, slots: int, samples: int, steps: int, batch: float = 1.0, **changes: Any
) -> Plan:
    """Plan of a cluster whose batches have `batch` answers for each slot of its devices."""
    prompts = max(1, round(devices * slots * batch / samples))
    return replace(Plan(devices, None, prompts, samples, steps=steps, pace=Pace(slots=slots)), **changes)


def best_part(schedule: Schedule, base: Plan) -> int | None:
    """Share of the devices with which a schedule makes most updates per hour, found by hill climbing."""
    if schedule.in_turn:
        return None
    found: dict[int, float] = {}

    def updates(part: int) -> float:
        if part not in found:
            found[part] = (
                Cluster(schedule.plan(base, part)).figures().updates_per_h if part in _PARTS else 0.0
            )
        return found[part]

    best = _FIRST_PART
    for direction in (1, -1):
        while updates(best + direction) > updates(best):
            best += direction
    return best


def row(schedule: Schedule, base: Plan, small: Plan) -> Row:
    """Result of a schedule with its best split of the devices."""
    plan = schedule.plan(base, best_part(schedule, small))
    start_s = time.process_time()
    return Row(schedule.name, plan.generation, Cluster(plan).figures(), time.process_time() - start_s)


HEAD = (
    "| way | devices that generate | updates per hour | against in turn | tokens/s | training busy "
    "| slots busy | staleness, mean (max) | tokens of an answer | thrown tokens | read / sampled "
    "| groups dropped | simulated in, CPU s |\n| --- |" + " --- |" * 12
)


def line(one: Row, devices: int, first: Row) -> str:
    """Line of the first table."""
    f = one.figures
    where = f"{devices} in turn" if one.generation is None else f"{one.generation} of {devices}"
    ratio = f.updates_per_h / first.figures.updates_per_h
    return (
        f"| {one.way} | {where} | {f.updates_per_h:.1f} | {ratio:.2f} | {f.tokens_per_s:,.0f} "
        f"| {f.training_busy:.0%} | {f.slots_busy:.0%} | {f.staleness_mean:.2f} ({f.staleness_max}) "
        f"| {f.answer_tokens:,.0f} | {max(0.0, f.thrown):.1%} | {f.reread:.1%} | {f.dropped:.1%} "
        f"| {one.cpu_s:.0f} |"
    )


# Name of a scenario -> changes of the plan.
SCENARIOS: dict[str, Mapping[str, Any]] = {
    "as above": {},
    "answers of 4000 tokens, all": {"lengths": Lengths(sigma=0.0)},
    "answers of 500 tokens, all": {"lengths": Lengths(mean=500.0, sigma=0.0, block=20), "train_s": 30.0 / 8},
    "training takes ten times as long": {"train_s": 300.0},
    "training takes a tenth": {"train_s": 3.0},
    "an update of the weights takes 90 s": {"write_s": 30.0, "load_s": 60.0},
    "batches of a sixteenth": {"batch": 1 / 16, "train_s": 30.0 / 16},
    "batches of four times as much": {"batch": 4.0, "train_s": 120.0},
}
_COMPARED = (SCHEDULES[0], Schedule("one step off", 1), Schedule("ahead 4, keep", 4))


def scenario(name: str, make: Callable[..., Plan]) -> list[Row]:
    """Results of a few schedules in a scenario."""
    changes = dict(SCENARIOS[name])
    load_s = changes.pop("load_s", None)
    base = make(**changes)
    if load_s is not None:
        base = replace(base, pace=replace(base.pace, load_s=load_s))
    return [row(schedule, base, base) for schedule in _COMPARED]


def scenario_line(name: str, rows: Sequence[Row], devices: int) -> str:
    """Line of the second table."""
    first, *others = (one.figures.updates_per_h for one in rows)
    cells = [
        f"{updates:.1f} ({updates / first:.2f}; {one.generation} of {devices})"
        for updates, one in zip(others, rows[1:], strict=True)
    ]
    return f"| {name} | {first:.1f} | {' | '.join(cells)} |"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw bars of the updates per hour."""
    figure = Figure(figsize=(8, 0.28 * len(rows) + 0.9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = list(reversed(rows))
    bars = axes.barh(
        [one.way for one in shown], [one.figures.updates_per_h for one in shown], color="#4878a8"
    )
    axes.bar_label(bars, [f"{one.figures.updates_per_h:.1f}" for one in shown], padding=3, fontsize=8)
    axes.set_xlabel("updates per hour")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Run the simulations, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engines", type=int, default=1000, help="devices of the cluster; each can have one engine"
    )
    parser.add_argument(
        "--small",
        type=int,
        default=60,
        help="devices of the cluster of the search and of the second table",
    )
    parser.add_argument(
        "--slots", type=int, default=32, help="answers that an engine decodes at the same time"
    )
    parser.add_argument("--samples", type=int, default=16, help="answers of a group")
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        help="steps that count, in whole rounds of max_staleness + 1; two more rounds before",
    )
    parser.add_argument("--ways", nargs="+", default=None, help="names of schedules; default: all")
    parser.add_argument("--skip", nargs="+", default=[], choices=("ways", "scenarios"))
    parser.add_argument(
        "--measured",
        type=Path,
        default=None,
        help="file of benchmarks/asynchrony.py: only predict its figures",
    )
    parser.add_argument("--json", type=Path, default=None, help="write all figures")
    parser.add_argument("--png", type=Path, default=None, help="draw the first table")
    options = parser.parse_args()
    if options.measured:
        print(compared(json.loads(options.measured.read_text(encoding="utf-8"))))
        return

    def make_plan(devices: int, **changes: Any) -> Plan:
        return base_plan(
            devices, slots=options.slots, samples=options.samples, steps=options.steps, **changes
        )

    results: dict[str, list[Row]] = {}
    if "ways" not in options.skip:
        base, small = make_plan(options.engines), make_plan(options.small)
        schedules = [one for one in SCHEDULES if options.ways is None or one.name in options.ways]
        print(
            f"{date.today().isoformat()}, {options.engines} devices, "
            f"batches of {base.prompts_per_step} x {options.samples}\n\n{HEAD}"
        )
        rows = results["ways"] = []
        for schedule in schedules:
            rows.append(row(schedule, base, small))
            print(line(rows[-1], options.engines, rows[0]), flush=True)
        if options.png:
            draw(rows, options.png)
    if "scenarios" not in options.skip:
        names = " | ".join(schedule.name for schedule in _COMPARED[1:])
        print(
            f"\n{options.small} devices\n\n| | in turn | {names} |\n| --- |" + " --- |" * len(_COMPARED),
            flush=True,
        )
        for name in SCENARIOS:
            results[name] = scenario(name, lambda **changes: make_plan(options.small, **changes))
            print(scenario_line(name, results[name], options.small), flush=True)
    if options.json:
        figures = {name: [asdict(one) for one in rows] for name, rows in results.items()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
