"""Updates per second of GRPO with generation ahead of training, against "in turn" and TRL; one thread each.

All sides train the same model on the same prompts. They run by turns in bursts of some steps. Meanwhile the
others are stopped, answers in flight included, so that no side fills its buffers while another is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from sides import TRL_FOLDER, Side, machine, trl_python, write_workload
from stepping import Workload

_SERVED = (
    "rollout.engine=served",
    "rollout.servers=1",
    "rollout.engine_options.threads=1",
    "rollout.timeout_s=600",
)


@dataclass(frozen=True)
class Loop:
    """A training loop that is measured.

    Attributes:
        worker: this project or TRL.
        settings: of this project.
        bf16: arithmetic of the forward and backward passes; else fp32.
        threads: of the process that trains.
    """

    worker: Literal["verl", "trl"]
    settings: tuple[str, ...] = ()
    bf16: bool = False
    threads: int = 1

    def workload(self, work: Workload, name: str) -> Workload:
        """Workload with the settings of this loop."""
        settings = (*self.settings, *(("policy.precision=bf16",) if self.bf16 else ()))
        return replace(
            work, name=name.replace(" ", "-"), settings=settings, trl_bf16=self.bf16, threads=self.threads
        )


SIDES = {
    "in turn": Loop("verl"),
    **{f"ahead {bound}": Loop("verl", (*_SERVED, f"pipeline.max_staleness={bound}")) for bound in (0, 1, 2)},
    "trl": Loop("trl"),
    "ahead 1 bf16": Loop("verl", (*_SERVED, "pipeline.max_staleness=1"), bf16=True),
    "trl bf16": Loop("trl", bf16=True),
    "in turn 2 threads": Loop("verl", threads=2),
    "trl 2 threads": Loop("trl", threads=2),
}
# Name of a workload -> width of the model of four layers, prompts and answers of a step, tokens of an answer
# and of a prompt.
WORKLOADS = {
    "0.8M": (128, 8, 8, 16, 8),
    "3.2M": (256, 8, 8, 16, 8),
    "0.8M large": (128, 16, 8, 32, 8),
    "3.2M large": (256, 16, 8, 32, 8),
    "0.8M long prompts": (128, 8, 8, 16, 64),
    "3.2M long prompts": (256, 8, 8, 16, 64),
}


@dataclass(frozen=True)
class Row:
    """Result of one side, without the steps that warm up a burst.

    Attributes:
        name: of the side.
        wall_s: of a step, the median of the bursts.
        low_s, high_s: quartiles of these.
        cpu_s: of a step, of the process that trains.
        server_cpu_s: of a step, of the server.
        trainer_busy: share of the time that training did not wait for a batch.
        generation_busy: share of the time that generation did not wait for admission; None: it runs in turn.
        staleness: mean over tokens, in steps.
        reward: of the last tenth of the steps.
    """

    name: str
    wall_s: float
    low_s: float
    high_s: float
    cpu_s: float
    server_cpu_s: float
    trainer_busy: float
    generation_busy: float | None
    staleness: float
    reward: float


def measure(
    python: Path, work: Workload, names: Sequence[str], *, rounds: int, burst: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run bursts of all sides by turns; return the clock readings of each burst, and the report of each side.

    The first round warms up.
    """
    with ExitStack() as stack:
        sides = []
        for name in names:
            loop = SIDES[name]
            interpreter = python if loop.worker == "trl" else Path(sys.executable)
            side = stack.enter_context(Side(loop.worker, interpreter, loop.workload(work, name)))
            side.answer()
            sides.append(side)
        bursts: dict[str, list[dict[str, list[float]]]] = {name: [] for name in names}
        for _ in range(1 + rounds):
            for name, side in zip(names, sides, strict=True):
                bursts[name].append(side.burst(burst))
        return bursts, {name: side.stop() for name, side in zip(names, sides, strict=True)}


def row(
    name: str,
    bursts: Sequence[Mapping[str, Sequence[float]]],
    report: Mapping[str, Any],
    *,
    burst: int,
    warmup: int,
) -> Row:
    """Result of a side after its first burst."""
    kept = [(first * burst + warmup, (first + 1) * burst) for first in range(1, len(bursts))]
    steps = [step for start, stop in kept for step in report["steps"][start:stop]]
    totals = {clock: [sum(one[clock][warmup:]) for one in bursts[1:]] for clock in bursts[0]}
    wall_s = [seconds / (burst - warmup) for seconds in totals["wall_s"]]
    low, middle, high = statistics.quantiles(wall_s, n=4) if len(wall_s) > 1 else wall_s * 3
    waited = {
        stage: sum(step["phases"].get(f"wait_{stage}", 0.0) for step in steps)
        for stage in ("training", "admission")
    }
    everything = sum(totals["wall_s"])
    server = totals.get("server_cpu_s", [0.0])
    tenth = report["steps"][-max(1, len(report["steps"]) // 10) :]
    return Row(
        name,
        middle,
        low,
        high,
        statistics.median(totals["cpu_s"]) / (burst - warmup),
        statistics.median(server) / (burst - warmup),
        1 - waited["training"] / everything,
        1 - waited["admission"] / everything if any(server) else None,
        statistics.fmean(step.get("staleness", 0.0) for step in steps),
        statistics.fmean(step["reward"] for step in tenth),
    )


def table(rows: Sequence[Row]) -> str:
    """Table with a line for each side.

    "of TRL's" is the ratio of updates per second to TRL's. "by CPU" is that ratio by the CPU seconds of the
    busier process, as on a machine with a free core for each process.
    """
    trl = next((one for one in rows if one.name == "trl"), None)
    lines = [
        "| side | updates/s (quartiles) | of TRL's | by CPU | trainer CPU s | server CPU s | training busy "
        "| its CPU | generation busy | its CPU | staleness | reward |",
        "| --- |" + " --- |" * 11,
    ]
    for one in rows:
        ratios = (
            ["", ""]
            if trl is None
            else [f"{trl.wall_s / one.wall_s:.2f}", f"{trl.cpu_s / max(one.cpu_s, one.server_cpu_s):.2f}"]
        )
        shares = [
            one.trainer_busy,
            one.cpu_s / one.wall_s,
            one.generation_busy,
            one.server_cpu_s / one.wall_s,
        ]
        cells = [
            "" if share is None or (i > 1 and one.generation_busy is None) else f"{share:.0%}"
            for i, share in enumerate(shares)
        ]
        lines.append(
            f"| {one.name} | {1 / one.wall_s:.2f} ({1 / one.high_s:.2f} to {1 / one.low_s:.2f}) "
            f"| {' | '.join(ratios)} | {one.cpu_s:.3f} | {one.server_cpu_s:.3f} | {' | '.join(cells)} "
            f"| {one.staleness:.2f} | {one.reward:.3f} |"
        )
    return "\n".join(lines)


def run(name: str, python: Path, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Measure a workload; return the bursts and reports of `measure`, and a description of the workload."""
    hidden, num_prompts, num_samples, answer_tokens, prompt_tokens = WORKLOADS[name]
    sizes = {"num_prompts": num_prompts, "num_samples": num_samples, "answer_tokens": answer_tokens}
    steps, load = (1 + options.rounds) * options.burst, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(folder, steps=steps, trl_checkpointing=not options.trl_keeps_activations, **sizes)
        # Generation of a side is at most three batches ahead of its last step.
        total = (steps + 4) * num_prompts
        parameters = write_workload(work, num_prompts=total, hidden=hidden, prompt_characters=prompt_tokens)
        bursts, reports = measure(python, work, options.sides, rounds=options.rounds, burst=options.burst)
    description = (
        f"{num_prompts} prompts of {prompt_tokens} tokens x {num_samples} answers of {answer_tokens}, "
        f"{parameters / 1e6:.1f}M parameters, load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
    )
    return bursts, reports, description


def main() -> None:
    """Run the workloads one after the other, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=["0.8M", "3.2M"], choices=list(WORKLOADS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES)[:5], choices=list(SIDES))
    parser.add_argument(
        "--rounds", type=int, default=5, help="bursts of each side that count; one more warms up"
    )
    parser.add_argument("--burst", type=int, default=10, help="steps of a burst")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each burst that do not count")
    parser.add_argument("--env", type=Path, default=TRL_FOLDER, help="folder of TRL's environment")
    parser.add_argument(
        "--trl-keeps-activations",
        action="store_true",
        help="turn TRL's default off that recomputes activations",
    )
    parser.add_argument("--json", type=Path, help="file for all figures, with those of each step")
    options = parser.parse_args()
    # Handled as an interrupt, which ends the sides: stopped processes would stay for ever.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    python = (
        trl_python(options.env.resolve())
        if any(SIDES[name].worker == "trl" for name in options.sides)
        else Path(sys.executable)
    )
    results = {}
    print(
        f"{machine()}, {date.today().isoformat()}; {options.rounds} bursts of {options.burst} steps, "
        f"{options.warmup} of each left out"
    )
    for name in options.workloads:
        bursts, reports, description = run(name, python, options)
        results[name] = {"bursts": bursts, "reports": reports}
        rows = [
            row(side, bursts[side], reports[side], burst=options.burst, warmup=options.warmup)
            for side in options.sides
        ]
        print(f"\n{description}\n\n{table(rows)}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
