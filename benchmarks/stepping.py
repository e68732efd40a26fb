"""What both sides of a step benchmark share: the workload, and the gate that lets a training loop through one step at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """A GRPO run of one update per step, as small as a laptop can take.

    Attributes:
        folder: holds the model (`model/`), the prompts (`prompts.jsonl`) and what the workers write.
        steps: timed or warm-up steps; each worker does one more, untimed, to leave its loop by the usual way.
        num_prompts: prompts of a step.
        num_samples: answers per prompt.
        answer_tokens: tokens of every answer; nothing ends one earlier.
        lr: learning rate, constant.
        trl_checkpointing: let TRL recompute activations, as it does by default; this project does so only when asked.
    """

    folder: str
    steps: int
    num_prompts: int = 8
    num_samples: int = 8
    answer_tokens: int = 16
    lr: float = 3e-5
    trl_checkpointing: bool = True

    @classmethod
    def from_command_line(cls) -> Workload:
        """The workload that `command_line` wrote."""
        return cls(**json.loads(sys.argv[1]))

    def command_line(self) -> str:
        """The workload as one argument."""
        return json.dumps(asdict(self))

    @property
    def model(self) -> Path:
        """Folder of the model that both sides train."""
        return Path(self.folder, "model")

    @property
    def prompts(self) -> Path:
        """File of the prompts, one JSON object with `prompt` per line, read in order by both sides."""
        return Path(self.folder, "prompts.jsonl")


def share_of_vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward on both sides: the share of vowels in an answer, in a form that both call once per step."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


class Gate:
    """Stands at one place of a loop; JSON lines on standard output, requests `step` or `stop` on standard input.

    What libraries print goes to standard error, so that nothing but answers is on standard output.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._started: tuple[float, float] | None = None

    def wait(self) -> bool:
        """Answers with the seconds since the last request, blocks until the next, and returns whether it is for a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.answer({"wall_s": wall - self._started[0], "cpu_s": cpu - self._started[1]} if self._started else {"ready": True})
        asked = sys.stdin.readline().strip() == "step"
        self._started = (time.perf_counter(), time.process_time())
        return asked

    def answer(self, content: dict[str, Any]) -> None:
        """Writes one answer."""
        print(json.dumps(content), file=self._answers)
