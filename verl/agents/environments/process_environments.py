"""Environments of a run: a process for each episode, and the rows that name their environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from typing_extensions import override

from verl.agents.environments.choices import (
    EnvironmentChoice,
    chosen_environment,
    given_environment,
    row_environment,
)
from verl.agents.environments.process_sessions import (
    EnvironmentFacts,
    ProcessSession,
    environment_failure,
)
from verl.agents.environments.session import Environments, EnvironmentSession, EpisodeFailure, EpisodeStart
from verl.agents.processes.object_processes import LOAD_LIMIT_S, ObjectProcess, ObjectProcesses, definition_of
from verl.agents.processes.process_failure import ProcessFailure
from verl.config.agent import AgentConfig
from verl.utils.event_loops import BackgroundLoop
from verl.utils.sampling_types import Prompt

_HOSTED = "verl.agents.environments.hosted:HostedEnvironment"
# Rows that an environment without data of its own gives, where nothing says how many.
_SIZES = {"train": 500, "test": 100}
# Between the seeds of the rows of two data sets, which are counted up, and of the two splits.
_SEEDS, _TEST_SEEDS = 1 << 20, 1 << 30
# Prompt of these rows, to which the text of `reset` is appended.
_PROMPT = "Begin.\n\n"
# Column that names the environment, where a program hands over several.
DEFAULT_COLUMN = "environment"


class ProcessEnvironments(Environments):
    """Environments whose episodes each have a process of their own.

    Args:
        default: environment of rows that name none; None: each row names one.
        by_name: environments of the program that rows may name.
        column: with the environment of the row; None: all rows have the default.
        config: limits.
        note: takes human-readable lines.
    """

    def __init__(
        self,
        default: EnvironmentChoice | None,
        *,
        by_name: Mapping[str, EnvironmentChoice],
        column: str | None,
        config: AgentConfig,
        note: Callable[[str], None],
    ) -> None:
        self._default, self._by_name, self._column = default, dict(by_name), column
        self._config, self._note = config, note
        self._pools: dict[tuple[object, ...], ObjectProcesses] = {}
        self._facts: dict[tuple[object, ...], EnvironmentFacts] = {}

    @override
    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        try:
            choice = self.choice_of(start.prompt)
        except ValueError as error:
            raise EpisodeFailure("environment_error", str(error)) from error
        try:
            facts = await self.facts(choice)
            process = await self.process_of(choice, seed_of(start))
        except ProcessFailure as failure:
            raise environment_failure(choice.name, failure) from failure
        return ProcessSession(
            process,
            facts,
            seed_of(start),
            name=choice.name,
            columns=self.columns_of(start.prompt),
            call_timeout_s=self._config.call_timeout_s,
            max_chars=self._config.max_result_chars,
        )

    @override
    def check_data(self, prompts: Sequence[Prompt]) -> None:
        found: dict[tuple[object, ...], EnvironmentChoice] = {}
        for prompt in prompts:
            try:
                choice = self.choice_of(prompt)
            except ValueError as error:
                raise ValueError(f"row {prompt.index} of {prompt.source or 'the data'}: {error}") from None
            found.setdefault(choice.key, choice)
        self.check(found.values())
        for prompt in prompts:
            choice = self.choice_of(prompt)
            missing = [n for n in self._facts[choice.key].needs if n not in self.columns_of(prompt)]
            if missing:
                raise ValueError(
                    f"need the column {missing[0]!r} in each row for reset() of {choice.name}, row "
                    f"{prompt.index} of {prompt.source or 'the data'} has "
                    f"{', '.join(self.columns_of(prompt))}"
                )

    @override
    def rows(self, split: Literal["train", "test"], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self._default is None:
            raise ValueError(
                "need agent.environment for rows of the environment's own data, got agent.environment_column "
                "alone; name files in data.train"
            )
        choice = self._default
        options = dict(options)
        size = options.get("size", _SIZES[split])
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"need a whole number of rows from 1 as the option size, got {size!r}")
        given = self.at_start(self.rows_in_process(choice, split, options), choice)
        if given is not None:
            return [dict(row) for row in given]
        if unknown := sorted(options.keys() - {"size", "seed", "prompt"}):
            raise ValueError(
                f"{choice.name} has no data of its own, so no option {unknown[0]!r}, only size, seed and "
                "prompt"
            )
        first = int(options.get("seed", 0)) * _SEEDS + (_TEST_SEEDS if split == "test" else 0)
        prompt = [{"role": "user", "content": str(options.get("prompt", _PROMPT))}]
        return [{"prompt": prompt, "seed": first + number} for number in range(size)]

    @override
    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def choice_of(self, prompt: Prompt) -> EnvironmentChoice:
        """The environment of a row.

        Raises:
            ValueError: it names none, or one that there is not.
        """
        value = None if self._column is None else prompt.columns.get(self._column)
        if value is None or value == "":
            if self._default is None:
                raise ValueError(
                    f"need the environment of the row in the column {self._column!r}, it has none"
                )
            return self._default
        return row_environment(value, str(self._column), given=self._by_name)

    def columns_of(self, prompt: Prompt) -> dict[str, Any]:
        """Columns of a row as an environment gets them, its prompt and its answer among them."""
        own = {"prompt": prompt.content} | ({} if prompt.answer is None else {"answer": prompt.answer})
        return {name: value for name, value in prompt.columns.items() if name != self._column} | own

    async def facts(self, choice: EnvironmentChoice) -> EnvironmentFacts:
        """Facts of an environment, asked once.

        Raises:
            ProcessFailure: it cannot be loaded or made, or has nothing that answers the policy.
        """
        if choice.key not in self._facts:
            process = await self.process_of(choice, seed=0)
            try:
                found = await process.call("facts", timeout_s=LOAD_LIMIT_S)
            finally:
                await process.close()
            self._facts[choice.key] = EnvironmentFacts(**found)
        return self._facts[choice.key]

    async def process_of(self, choice: EnvironmentChoice, seed: int) -> ObjectProcess:
        """A process with the environment in it.

        Raises:
            ProcessFailure: it cannot be loaded or made.
        """
        definition = definition_of(choice.definition)
        return await self.pool_of(choice).open(definition, dict(choice.options), seed, random_seed=seed)

    def pool_of(self, choice: EnvironmentChoice) -> ObjectProcesses:
        """Processes of all environments of one class or adapter."""
        if choice.place not in self._pools:
            self._pools[choice.place] = ObjectProcesses(
                _HOSTED,
                max_processes=self._config.max_processes,
                name=choice.name.partition(":")[0] if choice.preload else choice.name,
                preload=[choice.definition, *([choice.preload] if choice.preload else [])],
                note=self._note,
                python=choice.python,
            )
        return self._pools[choice.place]

    def check(self, choices: Iterable[EnvironmentChoice]) -> None:
        """Load environments before the first step.

        Raises:
            ValueError: one cannot be loaded or made.
        """
        for choice in choices:
            self.at_start(self.facts(choice), choice)

    def at_start(self, work: Any, choice: EnvironmentChoice) -> Any:
        """Result of a coroutine before the first step; a failure is an error of the settings.

        Raises:
            ValueError: it fails.
        """
        loop = BackgroundLoop("environments")
        try:
            return loop.run(work)
        except ProcessFailure as failure:
            raise ValueError(f"the environment {choice.name} cannot be used: {failure.detail}") from failure
        finally:
            loop.close()

    async def rows_in_process(
        self, choice: EnvironmentChoice, split: str, options: Mapping[str, Any]
    ) -> list[dict[str, Any]] | None:
        """Rows of the data of an environment; None: it has none."""
        process = await self.process_of(choice, seed=0)
        try:
            rows: list[dict[str, Any]] | None = await process.call(
                "rows", split, options, timeout_s=LOAD_LIMIT_S
            )
            return rows
        finally:
            await asyncio.shield(process.close())


def seed_of(start: EpisodeStart) -> int:
    """Seed of an episode: that of its row, its column `seed`; else that which siblings share."""
    own = start.prompt.columns.get("seed")
    return own if isinstance(own, int) and not isinstance(own, bool) else start.seed


def build_environments(
    config: AgentConfig,
    given: Any = None,
    *,
    note: Callable[[str], None] = lambda line: None,
) -> ProcessEnvironments:
    """The environments of a run, loaded once so that a mistake is found before the first step.

    Args:
        config: names, options and limits.
        given: a class or factory in place of `agent.environment`, or several by name, of which each row names
            one in the column `agent.environment_column`, or `environment`.
        note: takes human-readable lines.

    Raises:
        ValueError: there is no such environment, or it cannot be loaded.
    """
    column, by_name = config.environment_column, dict[str, EnvironmentChoice]()
    default = None if config.environment is None else chosen_environment(config.environment)
    if isinstance(given, Mapping):
        by_name = {str(name): given_environment(one) for name, one in given.items()}
        column = column or DEFAULT_COLUMN
    elif given is not None:
        if default is not None:
            raise ValueError(
                f"need agent.environment or the argument environment, got both ({default.name}); leave one "
                "out"
            )
        default = given_environment(given)
    if default is not None:
        by_name.setdefault(default.name, default)
    made = ProcessEnvironments(default, by_name=by_name, column=column, config=config, note=note)
    try:
        made.check(by_name.values())
    except BaseException:
        made.close()
        raise
    return made
