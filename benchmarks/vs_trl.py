"""Seconds of a GRPO step of this project and of TRL, on the same model, prompts and lengths, alternating.

TRL has its own environment, made on the first run. Each side has one process for the whole run, and one
thread. While one side makes a step, the other one waits, so both have the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from sides import TRL_FOLDER, Side, machine, trl_python, write_workload
from stepping import Workload

WARMUP_STEPS = 3


def measure(python: Path, work: Workload) -> dict[str, Any]:
    """Alternate steps of the two sides; return their seconds of each step after the warm-up, and reports."""
    load_before = os.getloadavg()
    with (
        Side("verl", Path(sys.executable), work) as ours,
        Side("trl", python, replace(work, name="trl")) as theirs,
    ):
        sides = (ours, theirs)
        for side in sides:
            side.answer()
        timed: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for _ in range(work.steps):
            for side in sides:
                timed[side.name].append({name: seconds for name, (seconds,) in side.burst(1).items()})
        reports = {side.name: side.stop() for side in sides}
    seconds = {name: steps[WARMUP_STEPS:] for name, steps in timed.items()}
    return {"seconds": seconds, "reports": reports, "load_before": load_before, "load_after": os.getloadavg()}


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, quartiles and ratios (this project over TRL) of wall and CPU seconds."""
    result: dict[str, Any] = {}
    for kind in ("wall_s", "cpu_s"):
        ours, theirs = ([step[kind] for step in measured["seconds"][name]] for name in ("verl", "trl"))
        result[kind] = {
            "verl": statistics.quantiles(ours, n=4),
            "trl": statistics.quantiles(theirs, n=4),
            "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
            "median_of_pairwise_ratios": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    for name, report in measured["reports"].items():
        steps = report["steps"][WARMUP_STEPS:]
        result[name] = {
            "phases": {
                phase: statistics.median(s["phases"][phase] for s in steps) for phase in steps[0]["phases"]
            },
            "answer_tokens": statistics.mean(s["answer_tokens"] for s in steps),
            "first_rewards": statistics.mean(s["reward"] for s in report["steps"][:3]),
            "last_rewards": statistics.mean(s["reward"] for s in report["steps"][-3:]),
            "versions": report["versions"],
        }
    return result


def report_lines(result: dict[str, Any], work: Workload) -> list[str]:
    """The result as human-readable lines."""
    rows = work.num_prompts * work.num_samples
    lines = [
        f"{result['machine']}, load {result['load_before'][0]:.1f} before and "
        f"{result['load_after'][0]:.1f} after, {result['date']}",
        f"{work.num_prompts} prompts x {work.num_samples} answers x {work.answer_tokens} tokens, "
        f"{result['parameters'] / 1e6:.1f}M parameters, fp32, 1 thread, {work.steps - WARMUP_STEPS} rounds "
        f"after {WARMUP_STEPS} to warm up",
    ]
    for kind, title in (("wall_s", "seconds per step"), ("cpu_s", "CPU seconds per step")):
        times = result[kind]
        for name in ("verl", "trl"):
            low, middle, high = times[name]
            lines.append(f"{title:<21}{name:<5} median {middle:.4f}  quartiles {low:.4f} to {high:.4f}")
        pairs = times["median_of_pairwise_ratios"]
        lines.append(
            f"{title:<21}ratio verl / trl {times['ratio_of_medians']:.3f} of medians, "
            f"{pairs:.3f} median of pairs"
        )
    for name in ("verl", "trl"):
        side = result[name]
        phases = ", ".join(f"{phase} {seconds:.4f}" for phase, seconds in side["phases"].items())
        versions = ", ".join(f"{package} {number}" for package, number in side["versions"].items())
        lines += [
            f"{name}: {phases} s; {side['answer_tokens'] * rows:.0f} tokens generated and trained per step; "
            f"mean reward {side['first_rewards']:.3f} -> {side['last_rewards']:.3f}",
            f"{name}: {versions}",
        ]
    return lines


def main() -> int:
    """Run the benchmark; return 1 if a step takes more than the allowed share of a step of TRL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=TRL_FOLDER, help="folder of TRL's environment")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each side")
    parser.add_argument("--most", type=float, default=0.7, help="largest ratio of medians that is a success")
    parser.add_argument(
        "--trl-keeps-activations",
        action="store_true",
        help="turn TRL's default off that recomputes activations",
    )
    parser.add_argument("--json", type=Path, help="file for all figures, each step's too")
    options = parser.parse_args()
    python = trl_python(options.env.resolve())
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(
            folder, steps=WARMUP_STEPS + options.rounds, trl_checkpointing=not options.trl_keeps_activations
        )
        parameters = write_workload(work, num_prompts=(work.steps + 2) * work.num_prompts)
        measured = measure(python, work)
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "parameters": parameters,
        "raw": measured["seconds"],
    }
    result |= {name: measured[name] for name in ("load_before", "load_after")} | summary(measured)
    print("\n".join(report_lines(result, work)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
    return int(result["wall_s"]["ratio_of_medians"] > options.most)


if __name__ == "__main__":
    sys.exit(main())
