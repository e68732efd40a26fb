"""Base of the judges: their server, their endpoint and cache, their question template, and their metrics."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from verl.data.trajectory import Trajectory
from verl.engines.hf.models import Precision
from verl.rewards.failures import FatalRewardError, RewardFailure
from verl.rewards.judge.endpoint import JudgeEndpoint, Question, Verdict
from verl.rewards.judge.judge_options import JudgeOptions, options_of, text_or_file
from verl.rewards.judge.judge_prompts import QuestionTemplate, common_fields
from verl.rewards.judge.reply_cache import ReplyCache
from verl.rewards.judge.spending import Tally
from verl.rewards.judge.verdicts import ReadVerdict, Reply, UnreadableReplyError
from verl.rollout.inference_server import ServerSpec
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.event_loops import BackgroundLoop
from verl.utils.network import key_from_environment
from verl.utils.sampling_types import Prompt

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_DTYPES: Final[Mapping[Precision, str]] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHOWN = 1000


@dataclass
class Judgement:
    """Verdicts of a judge on some answers.

    Attributes:
        values: of each answer: a number, a mapping with `reward`, the failure, or None if the judge does not
            apply to it.
        texts: replies about each answer, for the table of samples.
        metrics: further metrics by name.
    """

    values: list[Any]
    texts: list[str]
    metrics: dict[str, float] = field(default_factory=dict)


class Judge(ABC):
    """A reward function over all answers of a call, whose values are a judge's verdicts.

    Args:
        options: from the settings.
        folder: of the run, for the cache and for the log of the judge's own server; None: a temporary one.
        note: takes a sentence about the judge.
        sleep: pauses between retries.

    Attributes:
        options: checked.
        template: of the question.

    Raises:
        ValueError: options that are wrong, or an endpoint that does not answer a first question.
        EngineError: the judge's own server does not start.
    """

    name: ClassVar[str]
    kind: ClassVar[type[JudgeOptions]]
    source: ClassVar[str]  # of the built-in template
    fields: ClassVar[tuple[str, ...]]  # of the template

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        folder: Path | None = None,
        note: Callable[[str], None] = _LOG.warning,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.options = options_of(self.kind, options)
        self._rubric = text_or_file(self.options.rubric, name="rubric")
        given = text_or_file(self.options.template, name="template")
        self.template = QuestionTemplate(
            given or self.source, ("prompt", "reference", "rubric", *self.fields)
        )
        self._has_own_template, self._note, self._sleep = bool(given), note, sleep
        self._folder = folder or Path(tempfile.mkdtemp(prefix="verl-judge-"))
        self._server: EmbeddedServer | None = None
        self._cache: ReplyCache | None = None
        self._open_endpoint: JudgeEndpoint | None = None
        self._loop = BackgroundLoop(self.name)
        try:
            self._loop.run(self._open())
        except BaseException:
            self.close()
            raise

    def __call__(
        self,
        trajectories: Sequence[Trajectory],
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, Sequence[Any]], None],
    ) -> list[Any]:
        """Value of each answer; siblings are those of one group.

        Raises:
            FatalRewardError: a limit is reached, or no later question could be answered.
        """
        if self._loop.is_closed:
            raise RuntimeError("the judge is closed, build the reward functions again")
        tally = Tally()
        judgement = self._loop.run(self.judge(trajectories, tally))
        for name, count in tally.metrics().items():
            log_metric(f"{self.name}/{name}", count / len(trajectories))
        total = self.endpoint.budget.total
        for name, value in {
            **judgement.metrics,
            "total_calls": total.calls,
            "total_cost": total.cost,
        }.items():
            log_metric(f"{self.name}/{name}", value)
        log_extra(f"{self.name}/reply", [text[:_SHOWN] for text in judgement.texts])
        return judgement.values

    @property
    def endpoint(self) -> JudgeEndpoint:
        """The judge's model."""
        assert self._open_endpoint is not None, "the judge is closed"
        return self._open_endpoint

    @abstractmethod
    async def judge(self, rows: Sequence[Trajectory], tally: Tally) -> Judgement:
        """Judge answers; the counts of their questions are added to the tally."""

    @abstractmethod
    def example(self, prompt: Prompt) -> tuple[Question, ReadVerdict]:
        """A question about a prompt, to try the endpoint, and the function that reads its verdict."""

    def check(self, prompt: Prompt) -> None:
        """Check a prompt of the data.

        Raises:
            ValueError: it lacks a column of the template, or a reference answer that the judge needs.
        """
        missing = [name for name in self.template.columns if name not in prompt.columns]
        if missing:
            raise ValueError(
                f"row {prompt.index} of {prompt.source or 'the data'}: need the column {', '.join(missing)} "
                f"for the judge's template, got {', '.join(prompt.columns) or 'none'}; its fields are "
                f"prompt, reference, rubric, {', '.join(self.fields)}, and columns of the data"
            )
        if prompt.answer is None and self.needs_reference:
            raise ValueError(
                f"row {prompt.index} of {prompt.source or 'the data'}: need a reference answer for the "
                "judge; name its column in data.answer_key"
            )

    @property
    def needs_reference(self) -> bool:
        """True if a prompt without a reference answer cannot be judged."""
        return self._has_own_template and "reference" in self.template.fields

    @property
    def form(self) -> str:
        """Beginning of the sentence on the form of the verdict."""
        if self.options.prefill:
            return "Reply with one line of JSON alone"
        return "Think briefly, then end your reply with one line of JSON"

    def question(self, prompt: Prompt, fields: Mapping[str, str]) -> str:
        """The text of the question about a prompt, with the blocks of its answers.

        Raises:
            ValueError: the template fails.
        """
        return self.template.render({**common_fields(prompt, self._rubric), **fields}, prompt.columns)

    async def verdicts(
        self, question: Question, read: ReadVerdict, tally: Tally
    ) -> list[Verdict] | RewardFailure:
        """Those of `samples` replies that have a verdict; the first failure if none has."""
        asked = [replace(question, sample=i) for i in range(self.options.samples)]
        answers = await settled([self.endpoint.ask(each, read, tally) for each in asked])
        verdicts = [a for a in answers if isinstance(a, Verdict)]
        return verdicts or next(a for a in answers if isinstance(a, RewardFailure))

    def close(self) -> None:
        """End the connections and the judge's own server; may be called again."""
        if self._loop.is_closed:
            return
        self._loop.run(self._close())
        self._loop.close()

    async def _open(self) -> None:
        o = self.options
        server = await self._serve(o.path, o.precision) if o.path is not None else None
        cache = self._folder / "judge_cache.sqlite" if o.cache == "run" else Path(o.cache)
        self._cache = None if o.cache == "off" else ReplyCache(cache)
        self._open_endpoint = JudgeEndpoint(
            o,
            address=server.address if server else str(o.address),
            model=o.path or str(o.model),
            identity=model_identity(o.path) if o.path else f"{o.address} {o.model}",
            api_key=server.secret if server else key_from_environment(o.api_key_env, "the judge"),
            cache=self._cache,
            check=server.check_process if server else None,
            sleep=self._sleep,
        )
        await self._try_out()

    async def _serve(self, path: str, precision: Precision) -> EmbeddedServer:
        """Start a server of the judge's own model, which ends with the run."""
        spec = ServerSpec(
            f"server of {self.name}",
            path,
            {"max_slots": self.options.concurrency, "device": self.options.device},
            log=self._folder / f"{self.name}.log",
            dtype=_DTYPES[precision],
        )
        self._server = EmbeddedServer(spec)
        await self._server.open()
        return self._server

    async def _try_out(self) -> None:
        """Ask a first question: a wrong key or address, or a wrong field, ends the run before it begins."""
        o = self.options
        columns = dict.fromkeys(self.template.columns, "")
        question, read = self.example(Prompt("What is 2 + 2?", answer="4", columns=columns))
        place = o.path or f"{o.model} at {o.address}"
        start_s = time.monotonic()
        try:
            answer = await self.endpoint.probe(question)
        except FatalRewardError as error:
            raise ValueError(str(error)) from error
        if isinstance(answer, RewardFailure):
            raise ValueError(
                f"need an answer of the judge {place} to a first question, got: "
                f"{answer.detail}; start its server, or correct its options"
            )
        seconds = time.monotonic() - start_s
        self._note(f"{self.name}: {place} answered a first question in {seconds:.1f} s")
        reply: Reply = answer.value
        try:
            read(reply)
        except UnreadableReplyError as error:
            self._note(
                f"{self.name}: the first reply of {place} has no verdict ({error}); answers that it does "
                "not judge have no reward. Take a stronger judge, or ask for less in the template"
            )

    async def _close(self) -> None:
        if self._open_endpoint is not None:
            await self._open_endpoint.close()
        if self._server is not None:
            await self._server.close()
        if self._cache is not None:
            self._cache.close()


def group_rows(rows: Sequence[Trajectory]) -> list[list[int]]:
    """Positions of the answers of each group: one prompt, and one number of a group."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        prompt = row.prompt
        groups.setdefault((row.group, prompt.source, prompt.index, repr(prompt.content)), []).append(i)
    return list(groups.values())


async def settled(works: Collection[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of concurrent coroutines; an error of one is raised when all have ended.

    So replies that are paid for reach the cache.
    """
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def model_identity(path: str) -> str:
    """A model by its name, and for a folder by the size and time of its files."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return f"{os.path.realpath(folder)} {files}"
