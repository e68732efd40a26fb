"""Episodes of agents that run their own loop: a function or a command that speaks to the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from verl.agents.environments.session import EpisodeFailure
from verl.agents.episodes.driver import EpisodeDriver
from verl.agents.episodes.live_episode import LiveEpisode
from verl.agents.processes.object_processes import ObjectProcesses, definition_of
from verl.agents.processes.process_failure import ProcessFailure
from verl.agents.programs.gateway import Access, Gateway
from verl.agents.programs.program_host import reward_in
from verl.agents.programs.program_session import ProgramSession
from verl.config.agent import AgentConfig
from verl.utils.network import proxy_exceptions
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

_HOSTS = "verl.agents.programs.program_host"
# Longer tasks are no environment variable: Linux limits one to 128 KiB.
_MAX_VARIABLE_CHARS = 100_000
# The limit of the episode is over before: this one ends a call that nobody waits for any more.
_MARGIN_S = 60.0


class Program(ABC):
    """A program of the user, run once for each episode."""

    @abstractmethod
    async def run(self, task: dict[str, Any], variables: dict[str, str], folder: str) -> Any:
        """Its reward; None: it gave none.

        Args:
            task: the row.
            variables: of the environment.
            folder: of this episode.

        Raises:
            EpisodeFailure: it failed.
        """

    @abstractmethod
    async def check(self) -> None:
        """Check that it can be started.

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def close(self) -> None:
        """End all processes; may be called again."""


class FunctionProgram(Program):
    """A function `solve(task, client)`, plain or async, in a process of its own for each episode.

    Args:
        function: "file.py:name", "package.module:name", or the function.
        config: limits.
        note: takes human-readable lines.
    """

    def __init__(self, function: Any, config: AgentConfig, note: Callable[[str], None]) -> None:
        self._name = function if isinstance(function, str) else str(function)
        self._definition, self._limit_s = definition_of(function), config.timeout_s + _MARGIN_S
        self._processes = ObjectProcesses(
            f"{_HOSTS}:SolveHost",
            max_processes=config.max_processes,
            name="program",
            preload=[function, "openai:OpenAI"],
            note=note,
        )

    @override
    async def run(self, task: dict[str, Any], variables: dict[str, str], folder: str) -> Any:
        with_seed = partial(self._processes.open, random_seed=task["seed"])
        return await called(with_seed, self._definition, self._limit_s, task, variables)

    @override
    async def check(self) -> None:
        try:
            process = await self._processes.open(self._definition)
        except ProcessFailure as failure:
            raise ValueError(
                f"need an agent.program that can be loaded, got {self._name}: {failure.detail}; correct it, "
                'put its folder on PYTHONPATH, or pip install "verl[agents]" for the openai package'
            ) from failure
        await process.close()

    @override
    def close(self) -> None:
        self._processes.close()


class CommandProgram(Program):
    """A command in any language.

    Args:
        words: of the command; the name of a file of the current folder is made absolute, since each episode
            has a folder of its own.
        config: limits.
    """

    def __init__(self, words: Sequence[str], config: AgentConfig) -> None:
        self._words = [os.path.abspath(word) if Path(word).is_file() else word for word in words]
        self._limit_s = config.timeout_s + _MARGIN_S
        self._processes = ObjectProcesses(
            f"{_HOSTS}:CommandHost", max_processes=config.max_processes, name="program"
        )
        # `python` is the interpreter of the run, also where its environment is not activated.
        self._path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

    @override
    async def run(self, task: dict[str, Any], variables: dict[str, str], folder: str) -> Any:
        text = json.dumps(task, default=plain_value)
        (Path(folder) / "task.json").write_text(text, encoding="utf-8")
        variables = {**variables, "PATH": self._path, "TASK_FILE": str(Path(folder) / "task.json")}
        if len(text) <= _MAX_VARIABLE_CHARS:
            variables["TASK_JSON"] = text
        result = await called(self._processes.open, None, self._limit_s, self._words, variables, folder)
        if result["fault"]:
            outcome = "environment_crash" if result.get("code", 0) < 0 else "environment_error"
            raise EpisodeFailure(outcome, f"the program failed: {result['fault']}")
        return reward_in(result["lines"])

    @override
    async def check(self) -> None:
        if shutil.which(self._words[0], path=self._path) is None:
            raise ValueError(
                f"need agent.program as the words of a command that exists, got {self._words[0]!r}; name a "
                "program on PATH, or the path of one"
            )

    @override
    def close(self) -> None:
        self._processes.close()


class ProgramDriver(EpisodeDriver):
    """Runs a program for each episode, and gives it the policy behind OpenAI's API.

    Args:
        config: the program and the limits.
        codec: of the policy.
        given: function in place of `agent.program`.
        note: takes human-readable lines.

    Raises:
        ValueError: the program cannot be loaded.
    """

    def __init__(
        self,
        config: AgentConfig,
        codec: TextCodec,
        *,
        given: Callable[..., Any] | None = None,
            note: Callable[[str], None] = lambda text: None,
    ) -> None:
        program = config.program if given is None else given
        self._note = note
        self._noted: set[str] = set()
        self._gateway: Gateway | None = None
        self._program: Program
        if isinstance(program, tuple):
            self._program = CommandProgram(program, config)
        elif isinstance(program, str) and ":" not in program:
            raise ValueError(
                'need agent.program as "file.py:function" or the words of a command as a list, got '
                f"{program!r}"
            )
        else:
            self._program = FunctionProgram(program, config, note)

    @override
    async def run(self, live: LiveEpisode) -> None:
        session = ProgramSession(live, self._note_once)
        gateway = self._opened_gateway()
        folder = tempfile.mkdtemp(prefix="verl-program-")
        failure: EpisodeFailure | None = None
        reward: Any = None
        with gateway.opened(session) as access, live.outside():
            work = self._program.run(task_of(live), variables_for(access), folder)
            program = asyncio.ensure_future(work)
            try:
                await asyncio.wait({program, session.stopped}, return_when=asyncio.FIRST_COMPLETED)
                if session.stopped.done():
                    session.stopped.result()  # raises what ended the episode
                    raise EpisodeFailure(
                        "environment_error", "the program went on with requests after the end of its episode"
                    )
                reward = program.result()
            except EpisodeFailure as error:
                failure = error
            finally:
                program.cancel()
                await asyncio.wait({program})
                shutil.rmtree(folder, ignore_errors=True)
        self._end(session, reward, failure)

    @override
    def check_data(self, prompts: Sequence[Prompt]) -> None:
        self._opened_gateway().loop.run(self._program.check())

    @override
    def close(self) -> None:
        self._program.close()
        if self._gateway is not None:
            self._gateway.close()

    def _opened_gateway(self) -> Gateway:
        if self._gateway is None or self._gateway.loop.is_closed:
            self._gateway = Gateway()
        return self._gateway

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)

    def _end(self, session: ProgramSession, reward: Any, failure: EpisodeFailure | None) -> None:
        """Note reward and ending of an episode.

        Raises:
            EpisodeFailure: the program failed, or ended without a turn of the policy.
        """
        live, ending = session.live, session.ending
        live.record.reward = reward if session.reward is None else session.reward
        if ending is None and session.is_full:
            ending = "max_tokens"
        if ending is not None:
            live.record.ending = ending
        if ending is not None and live.record.reward is None and failure is not None:
            raise EpisodeFailure(
                f"episode_{ending}",
                f"the episode reached its limit {ending}, and its program gave no reward: {failure.detail}; "
                "handle openai.BadRequestError in the program, and return a reward",
            )
        if failure is not None and ending is None:
            told = f"; the last request that was refused: {session.refused}" if session.refused else ""
            raise EpisodeFailure(failure.outcome, failure.detail + told)
        if ending is None and not live.num_turns:
            raise EpisodeFailure(
                "environment_error", "the program ended without a request to OPENAI_BASE_URL"
            )


async def called(open_process: Any, definition: Any, limit_s: float, *arguments: Any) -> Any:
    """Result of `run` of a host in a new process, which is ended with all that it started.

    Raises:
        EpisodeFailure: it gave none.
    """
    process = None
    try:
        process = await (open_process() if definition is None else open_process(definition))
        return await process.call("run", *arguments, timeout_s=limit_s)
    except ProcessFailure as failure:
        raise EpisodeFailure(
            f"environment_{failure.outcome}", f"the program failed: {failure.detail}"
        ) from failure
    finally:
        if process is not None:
            await asyncio.shield(process.close())


def task_of(live: LiveEpisode) -> dict[str, Any]:
    """The row of an episode as its program gets it: all columns, the prompt and the answer."""
    start = live.start
    prompt = start.prompt
    content = prompt.content if isinstance(prompt.content, str) else live.first_messages()
    own = {"seed": start.seed, "number": start.number, "source": prompt.source, "index": prompt.index}
    return {**own, **prompt.columns, "prompt": content, "answer": prompt.answer}


def variables_for(access: Access) -> dict[str, str]:
    """Variables of the environment through which a program finds the policy; no proxy is asked for it."""
    return {
        **proxy_exceptions(),
        "OPENAI_BASE_URL": access.url,
        "OPENAI_API_BASE": access.url,  # the name in earlier versions of the openai package
        "OPENAI_API_KEY": access.key,
        "OPENAI_MODEL": "policy",
        "VERL_REWARD_URL": access.url.removesuffix("/v1") + "/reward",
    }


def plain_value(value: Any) -> Any:
    """A value that JSON does not know: arrays as lists, mappings as objects, others as text."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
