"""The workload of a step benchmark, and the gate that makes a training loop stop after some steps."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """A GRPO run of one update per step, small enough for a laptop.

    Attributes:
        folder: has the model (`model/`), the prompts (`prompts.jsonl`) and the files of the workers.
        steps: timed or warm-up steps; each worker makes one more, untimed, to leave its loop as usual.
        name: of the side that runs it.
        num_prompts: prompts of a step.
        num_samples: answers per prompt.
        answer_tokens: length of every answer.
        lr: learning rate, constant.
        trl_checkpointing: let TRL recompute activations, as it does by default; this project does so only
            when asked.
        trl_bf16: let TRL compute in bf16.
        threads: of PyTorch in the process that trains.
        settings: further settings of this project's side, each KEY=VALUE.
    """

    folder: str
    steps: int
    name: str = "verl"
    num_prompts: int = 8
    num_samples: int = 8
    answer_tokens: int = 16
    lr: float = 3e-5
    trl_checkpointing: bool = True
    trl_bf16: bool = False
    threads: int = 1
    settings: tuple[str, ...] = ()

    @classmethod
    def from_command_line(cls) -> Workload:
        """The workload that `command_line` wrote."""
        return cls(**json.loads(sys.argv[1]))

    def command_line(self) -> str:
        """The workload as one argument."""
        return json.dumps(asdict(self))

    @property
    def model(self) -> Path:
        """Folder of the model that all sides train."""
        return Path(self.folder, "model")

    @property
    def prompts(self) -> Path:
        """File of the prompts, one JSON object with `prompt` per line, read in order by all sides."""
        return Path(self.folder, "prompts.jsonl")

    @property
    def output(self) -> Path:
        """Folder of the files that this side writes."""
        return Path(self.folder, self.name)


def share_of_vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward on all sides: the share of vowels in each of many answers."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


class Gate:
    """A stop in a loop: JSON lines on standard output; a number of steps, or `stop`, on standard input.

    Prints of libraries go to standard error, so that standard output has only answers.

    Args:
        clocks: further clocks by name, read at each step, as are `wall_s` and `cpu_s` of this process.

    Attributes:
        servers: ids of the processes that work for this one, part of the first answer.
    """

    def __init__(self, clocks: Mapping[str, Callable[[], float]] | None = None) -> None:
        self.clocks = {"wall_s": time.perf_counter, "cpu_s": time.process_time, **(clocks or {})}
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.servers: list[int] = []
        self._readings: list[dict[str, float]] = []
        self._left = 0

    def wait(self) -> bool:
        """Block until the next request, if all steps are done; return True if one more step is wanted.

        The answer to a request has the readings of each clock for each of its steps.
        """
        reading = {name: clock() for name, clock in self.clocks.items()}
        if self._left:
            self._left -= 1
            self._readings.append(reading)
        if self._left:
            return True
        self._answer_steps()
        asked = sys.stdin.readline().strip()
        self._left = int(asked) if asked.isdigit() else 0
        self._readings = [{name: clock() for name, clock in self.clocks.items()}]
        return self._left > 0

    def answer(self, content: dict[str, Any]) -> None:
        """Write one answer."""
        print(json.dumps(content), file=self._answers)

    def _answer_steps(self) -> None:
        if not self._readings:
            self.answer({"servers": self.servers})
            return
        pairs = list(zip(self._readings, self._readings[1:], strict=False))
        self.answer({name: [after[name] - before[name] for before, after in pairs] for name in self.clocks})
