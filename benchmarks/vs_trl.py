"""Seconds of a GRPO step of this project beside TRL's, on the same model, prompts and lengths, with one thread each, alternating.

TRL gets an environment of its own, made on the first run. One process per side lives through the whole run; while one
does a step the other one waits, so both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from stepping import Workload
from transformers import AutoTokenizer

from verl.engines.models import make_tiny_model

HERE = Path(__file__).parent
ROOT = HERE.parent
TRL = "trl==1.16.*"
WARMUP_STEPS = 3
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Side:
    """A worker process with an open training loop."""

    def __init__(self, name: str, python: Path, work: Workload) -> None:
        self.name = name
        # One thread, and no look at the network: everything is in the folder.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log_path = Path(work.folder, f"{name}.log")
        self._log = self._log_path.open("w")
        self._process = subprocess.Popen(
            [str(python), str(HERE / f"{name}_worker.py"), work.command_line()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env=env,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def answer(self) -> dict[str, Any]:
        """The next answer of the worker.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log_path.read_text().splitlines()[-15:])
            raise RuntimeError(f"the {self.name} worker ended before it answered; the end of its log:\n{tail}")
        return json.loads(line)

    def ask(self, what: str) -> dict[str, Any]:
        """Sends `step` or `stop` and returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.answer()


def trl_python(folder: Path) -> Path:
    """The interpreter of an environment with TRL and this project's versions of PyTorch and Transformers, made if it is not there."""
    python, stamp = folder / "bin/python", folder / "installed.txt"
    wanted = f"torch=={torch.__version__} {TRL}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {wanted} into {folder}, some minutes the first time", flush=True)
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    # First PyTorch, in the build that is used here: TRL alone would bring the one with gigabytes of CUDA libraries.
    index = ["--retries", "1", "--extra-index-url", CPU_INDEX] if torch.__version__.endswith("+cpu") else []
    subprocess.run([*pip, *index, f"torch=={torch.__version__}"], check=True)
    subprocess.run([*pip, TRL], check=True)
    stamp.write_text(wanted)
    return python


def write_workload(work: Workload, *, prompt_characters: int = 8, seed: int = 0) -> int:
    """Writes the model and the prompts; returns the number of parameters.

    The end token is one that the tokenizer knows and the model has no output for. Both sides look for it after every
    token, as they always do, and never find it: every answer has the same length.
    """
    make_tiny_model(work.model, hidden=256, layers=4, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(work.model)
    path = work.model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": tokenizer.eos_token_id}))
    vocabulary = json.loads((work.model / "config.json").read_text())["vocab_size"]
    assert tokenizer.eos_token_id >= vocabulary, f"the end token {tokenizer.eos_token_id} is one of the {vocabulary} outputs"
    rng = random.Random(seed)
    texts = ["".join(rng.choices(string.ascii_lowercase, k=prompt_characters)) for _ in range((work.steps + 2) * work.num_prompts)]
    work.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    # Each fp32 weight has four bytes; the file's header is some kilobytes.
    return (work.model / "model.safetensors").stat().st_size // 4


def measure(python: Path, work: Workload) -> dict[str, Any]:
    """Alternates steps of the two sides; their seconds, step by step and without the warm-up, and their reports."""
    load_before = os.getloadavg()
    with Side("verl", Path(sys.executable), work) as ours, Side("trl", python, work) as theirs:
        sides = (ours, theirs)
        for side in sides:
            side.answer()
        timed: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for _ in range(work.steps):
            for side in sides:
                timed[side.name].append(side.ask("step"))
        reports = {side.name: side.ask("stop") for side in sides}
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
            "phases": {phase: statistics.median(s["phases"][phase] for s in steps) for phase in steps[0]["phases"]},
            "answer_tokens": statistics.mean(s["answer_tokens"] for s in steps),
            "first_rewards": statistics.mean(s["reward"] for s in report["steps"][:3]),
            "last_rewards": statistics.mean(s["reward"] for s in report["steps"][-3:]),
            "versions": report["versions"],
        }
    return result


def report_lines(result: dict[str, Any], work: Workload) -> list[str]:
    """The result for people."""
    rows = work.num_prompts * work.num_samples
    lines = [
        f"{result['machine']}, load {result['load_before'][0]:.1f} before and {result['load_after'][0]:.1f} after, {result['date']}",
        f"{work.num_prompts} prompts x {work.num_samples} answers x {work.answer_tokens} tokens, {result['parameters'] / 1e6:.1f}M "
        f"parameters, fp32, 1 thread, {work.steps - WARMUP_STEPS} rounds after {WARMUP_STEPS} to warm up",
    ]
    for kind, title in (("wall_s", "seconds per step"), ("cpu_s", "CPU seconds per step")):
        times = result[kind]
        for name in ("verl", "trl"):
            low, middle, high = times[name]
            lines.append(f"{title:<21}{name:<5} median {middle:.4f}  quartiles {low:.4f} to {high:.4f}")
        pairs = times["median_of_pairwise_ratios"]
        lines.append(f"{title:<21}ratio verl / trl {times['ratio_of_medians']:.3f} of medians, {pairs:.3f} median of pairs")
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


def cpu_name() -> str:
    """The processor's model, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    """Runs the benchmark; 1 if a step takes more than the allowed share of TRL's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=ROOT / ".bench/trl", help="folder of TRL's environment")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each side")
    parser.add_argument("--most", type=float, default=0.7, help="largest ratio of medians that is a success")
    parser.add_argument("--trl-keeps-activations", action="store_true", help="turn TRL's default off that recomputes activations")
    parser.add_argument("--json", type=Path, help="file for all figures, each step's too")
    options = parser.parse_args()
    python = trl_python(options.env.resolve())
    with tempfile.TemporaryDirectory() as folder:
        work = Workload(folder, steps=WARMUP_STEPS + options.rounds, trl_checkpointing=not options.trl_keeps_activations)
        parameters = write_workload(work)
        measured = measure(python, work)
    machine = f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {"date": date.today().isoformat(), "machine": machine, "parameters": parameters, "raw": measured["seconds"]}
    result |= {name: measured[name] for name in ("load_before", "load_after")} | summary(measured)
    print("\n".join(report_lines(result, work)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
    return int(result["wall_s"]["ratio_of_medians"] > options.most)


if __name__ == "__main__":
    sys.exit(main())
