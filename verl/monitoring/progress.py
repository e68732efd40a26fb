"""Progress of a run for its reader: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from verl.monitoring.formatting import format_duration
from verl.monitoring.wait_tracker import Description, StageWaits, WaitTracker, evaluate_description

# Stages in the order in which one of them is shown, with the words around what it waits for. Generation ahead
# of training waits for every group by itself, so there the batch that training waits for says more.
_STAGES = {
    "update": "{}",
    "publishing": "publishing {}",
    "rewards": "rewarding: {}",
    "generation": "generating {}",
    "environments": "waiting for {}",
    "training": "waiting for {}",
}
# Stages that are named in a file; the others are short, or another one says more.
_NAMED = ("update", "rewards", "generation")
# Names of phases of a step that read badly.
_WORDS = {
    "update_policy": "updating the policy",
    "update_critic": "updating the critic",
    "trainer_logprobs": "computing the logprobs of the policy",
    "ref_logprobs": "computing the logprobs of the reference",
    "teacher_logprobs": "computing the logprobs of the teacher",
    "values": "computing the values of the critic",
}
_REFRESHES_PER_S = 2


class Progress:
    """Says which part of a run is in progress.

    On a terminal a live line shows the part that the run waits for, and for how long. In a file or a pipe, a
    part is one line when it begins for the first time; a part of the step is named only in the first step,
    since each step has a line of its own afterwards.

    Args:
        waits: of the run; its waits are shown.
        console: for the output; None: nothing is shown.
    """

    def __init__(self, waits: WaitTracker, console: Console | None) -> None:
        self._waits, self._console = waits, console
        self._said: set[str] = set()
        self._depth = 0
        self._live: Live | None = None
        self._prefix = ""
        self._names_parts = True
        if console and not console.is_terminal:
            waits.listener = self._begun

    def say(self, text: str) -> None:
        """Print a line."""
        if self._console:
            print_line(self._console, text)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Context of a part of the run that may take long, such as an evaluation; "" is not said."""
        if text and self._console and not self._console.is_terminal and text not in self._said:
            self._said.add(text)
            self.say(text)
        self._depth += 1
        try:
            with self._waits.track("update", text), self.live():
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def live(self) -> Iterator[None]:
        """Context with the live line, if the output is a terminal; inside of another one it does nothing."""
        if self._live or not self._console or not self._console.is_terminal:
            yield
            return
        self._live = Live(
            console=self._console,
            get_renderable=lambda: Text(self.line(), style="dim", no_wrap=True, overflow="ellipsis"),
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
        )
        try:
            with self._live:
                yield
        finally:
            self._live = None

    def begin_step(self, step: int, total: int) -> None:
        """Note the step whose parts follow; those of the first one are named."""
        self._names_parts = not self._prefix
        self._prefix = f"step {step}/{total}: " if step <= total else ""  # nothing follows the last step

    def line(self) -> str:
        """The part in progress, for the live line."""
        stages = {stage.stage: stage for stage in self._waits.snapshot().stages if stage.waits}
        shown = [name for name in _STAGES if name in stages]
        generation = stages.get("generation")
        if generation and generation.num_waits > 1 and "training" in stages:
            shown = [name for name in shown if name not in ("rewards", "generation")]
        return f"{self._prefix}{_described(stages[shown[0]])}" if shown else self._prefix.removesuffix(": ")

    def _begun(self, stage: str, description: Description) -> None:
        """Name a part of the first step, or of what comes before it, in a line."""
        if stage not in _NAMED or self._depth or not self._names_parts:
            return
        text = _in_words(stage, evaluate_description(description))
        # Generation ahead of training has many waits of one kind.
        key = text if stage == "update" else stage
        if self._prefix and key not in self._said:
            self._said.add(key)
            self.say(self._prefix + text)


def print_line(console: Console, text: str, *, style: str | None = None) -> None:
    """Print a line without wrapping or markup; characters that the output cannot hold are escaped.

    A console that is gone, such as a closed pipe, is ignored.
    """
    encoding = console.encoding or "utf-8"
    # Rich raises SystemExit on a closed pipe.
    with suppress(OSError, ValueError, SystemExit):
        console.out(text.encode(encoding, "backslashreplace").decode(encoding), style=style, highlight=False)


def _described(stage: StageWaits) -> str:
    wait = stage.waits[0]
    return f"{_in_words(stage.stage, wait.what)}, {format_duration(wait.for_s)}"


def _in_words(stage: str, what: str) -> str:
    return _STAGES[stage].format(_WORDS.get(what, what))
