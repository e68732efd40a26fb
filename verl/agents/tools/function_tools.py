"""Tools that are functions: built in, of a user's file, or handed over by a program."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_type_hints

from typing_extensions import override

from verl.agents.processes.object_processes import ObjectProcesses
from verl.agents.processes.process_failure import ProcessFailure
from verl.agents.processes.reusable_processes import ReusableProcesses
from verl.agents.tools.function_host import ToolFunctionHost, bound, is_coroutine
from verl.agents.tools.tool_source import (
    EpisodeTools,
    ToolEpisode,
    ToolFailure,
    ToolSource,
    tool_name,
    without_place,
)
from verl.rewards.execution.isolation import Callee, isolated
from verl.utils.event_loops import BackgroundLoop, call_in_thread, within
from verl.utils.tool_schemas import tool_schema
from verl.utils.user_code import exception_text

# The parameter of tools that must know their episode.
EPISODE = "episode"
_SETTING = "agent.tools"


@dataclass
class ToolFunction:
    """A function as a tool.

    Attributes:
        schema: in OpenAI's form.
        callee: the function and the place where it runs.
        options: bound to it.
        takes_episode: it has the parameter `episode`.
    """

    schema: dict[str, Any]
    callee: Callee
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_episode: bool = False

    @property
    def name(self) -> str:
        """Name of the tool."""
        return tool_name(self.schema)


def tool_function(
    found: Callable[..., Any],
    *,
    place: str,
    options: Mapping[str, Any] | None = None,
    imported_from: tuple[str, str] | None = None,
    schema: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> ToolFunction:
    """A tool from a function, an object that is called, or a class of such objects.

    Args:
        found: it.
        place: where it was named, for messages.
        options: bound to its parameters of these names, or those of the class.
        imported_from: module or file, and name, of one that only the run holds; see `isolated`.
        schema: in place of the one that its types and docstring give.
        name: of the tool; None: that of the function.

    Raises:
        ValueError: there is no such option, or no schema can be made.
    """
    options = dict(options or {})
    made: Any = made_object(found, options, place) if isinstance(found, type) else found
    called = made if inspect.isroutine(made) else made.__call__
    parameters = inspect.signature(called).parameters
    hidden = {EPISODE} if EPISODE in parameters else set()
    if not isinstance(found, type):
        if unknown := [name for name in options if name not in parameters]:
            raise ValueError(
                f"need options of the tool {place} that are its parameters ({', '.join(parameters)}), got "
                f"{', '.join(unknown)}"
            )
        hidden |= set(options)
    own = dict(schema) if schema else function_schema(called, hidden, name=name or name_of(made), place=place)
    callee = isolated(found, is_async=is_coroutine(made), imported_from=imported_from, setting=_SETTING)
    return ToolFunction(own, callee, options, EPISODE in parameters)


def made_object(found: type, options: Mapping[str, Any], place: str) -> Any:
    """An object of a class that is called.

    Raises:
        ValueError: it cannot be made or called.
    """
    try:
        made = found(**options)
    except Exception as error:  # user code, which may raise anything
        raise ValueError(f"the tool {place} cannot be made with {dict(options)}: {error}") from error
    if not callable(made):
        raise ValueError(
            f"need a function or a class with __call__ as the tool {place}, got {found.__name__}; a class "
            "whose methods are tools is an environment: name it in agent.environment"
        )
    return made


def name_of(function: Any) -> str:
    """Name of the tool of a function, or of an object that is called."""
    own = getattr(function, "name", None)
    if isinstance(own, str):
        return own
    if isinstance(function, partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__.lower())


def function_schema(
    function: Callable[..., Any], hidden: set[str], *, name: str, place: str
) -> dict[str, Any]:
    """Schema of a function from its types and its docstring, by Transformers, without some parameters.

    Raises:
        ValueError: it has no types, or its docstring does not describe every parameter.
    """

    def shown() -> None:
        """Stand in for the function, with the parameters that the policy sees."""

    signature = inspect.signature(function)
    kept = [each for each in signature.parameters.values() if each.name not in hidden]
    try:
        hints = get_type_hints(function)
    except Exception as error:  # of the user's annotations
        raise ValueError(f"the types of the tool {place} cannot be read: {error}") from error
    shown.__name__, shown.__doc__ = name, inspect.getdoc(function)
    shown.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    # Templates have no use for the type of the result, which need not be one of JSON.
    shown.__annotations__ = {each.name: hints[each.name] for each in kept if each.name in hints}
    return tool_schema(shown, place)


class FunctionTools(ToolSource):
    """Functions, each in processes that can be killed, or in the trainer where it shares state with it.

    Args:
        functions: at least one.
        timeout_s: limit of a call.
        max_processes: at a time.
        max_stuck: threads of the trainer still in a call over its limit, beyond which the run ends.
        note: takes sentences for the user.
    """

    def __init__(
        self,
        functions: Sequence[ToolFunction],
        *,
        timeout_s: float,
        max_processes: int,
        max_stuck: int = 16,
        note: Callable[[str], None],
    ) -> None:
        self.schemas = tuple(function.schema for function in functions)
        self._timeout_s, self._max_stuck = timeout_s, max_stuck
        self._functions = {function.name: function for function in functions}
        for function in functions:
            if function.callee.note:
                note(f"tool {function.name}: {function.callee.note}")
        isolated_ones = [each for each in functions if each.callee.definition is not None]
        self._numbers = {each.name: i for i, each in enumerate(isolated_ones)}
        definitions = [(each.callee.definition, dict(each.options)) for each in isolated_ones]
        processes = ObjectProcesses(
            ToolFunctionHost,
            max_processes=max_processes,
            name="tools",
            preload=[each.callee.definition for each in isolated_ones],
            note=note,
        )
        self._processes = ReusableProcesses(processes, (definitions,), max_processes=max_processes)
        self._loop: BackgroundLoop | None = None
        self._bound = {
            each.name: bound(each.callee.function, each.options)
            for each in functions
            if each.callee.definition is None
        }
        self._stuck: list[threading.Event] = []

    @override
    def open(self, episode: ToolEpisode) -> EpisodeTools:
        return FunctionCalls(self, episode)

    @override
    def close(self) -> None:
        self._processes.close()
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    async def run(self, name: str, arguments: dict[str, Any], episode: ToolEpisode) -> Any:
        """Value of a call.

        Raises:
            ToolFailure: it gave none.
            RuntimeError: too many calls in the trainer never return.
        """
        function = self._functions[name]
        if function.takes_episode:
            arguments = {**arguments, EPISODE: episode}
        if name in self._numbers:
            try:
                return await self._processes.call(
                    "run", self._numbers[name], arguments, timeout_s=self._timeout_s
                )
            except ProcessFailure as failure:
                raise ToolFailure.of_process(failure) from failure
        value, error = await self._run_in_trainer(function, partial(self._bound[name], **arguments))
        if error:
            raise ToolFailure("error", error, without_place(error))
        return value

    async def _run_in_trainer(self, function: ToolFunction, call: Callable[[], Any]) -> tuple[Any, str]:
        if function.callee.place == "inline":
            return attempt(call)
        has_ended = threading.Event()
        if function.callee.is_async:
            self._loop = self._loop or BackgroundLoop("async tools")
            work = self._loop.result_of(attempt_async(call, has_ended))
        else:
            work = call_in_thread(partial(attempt, call, has_ended), name=f"tool {function.name}")
        try:
            return await within(self._timeout_s, work)
        except TimeoutError as error:
            self._stuck = [each for each in (*self._stuck, has_ended) if not each.is_set()]
            if len(self._stuck) > self._max_stuck:
                raise RuntimeError(
                    f"need at most {self._max_stuck} calls of tools in the trainer that never return, got "
                    f"{len(self._stuck)}, the last one of {function.name!r}; name it as file.py:function in "
                    "agent.tools, so that it runs in a process that can be killed"
                ) from error
            raise ToolFailure("timeout", f"no result within {self._timeout_s:g} s") from error


class FunctionCalls(EpisodeTools):
    """Functions in one episode, which they hear of if they ask for it.

    Args:
        functions: of the run.
        episode: facts for a parameter `episode`.
    """

    def __init__(self, functions: FunctionTools, episode: ToolEpisode) -> None:
        self._functions, self._episode = functions, episode

    @override
    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return await self._functions.run(name, arguments, self._episode)


def attempt(call: Callable[[], Any], has_ended: threading.Event | None = None) -> tuple[Any, str]:
    """Value of a call and "", or None and its error in words; sets the event at the end."""
    try:
        return call(), ""
    except BaseException as error:  # user code, which may raise anything
        return None, exception_text(error)
    finally:
        if has_ended is not None:
            has_ended.set()


async def attempt_async(call: Callable[[], Any], has_ended: threading.Event) -> tuple[Any, str]:
    """As `attempt`, of a coroutine."""
    try:
        return await call(), ""
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # user code, which may raise anything
        return None, exception_text(error)
    finally:
        has_ended.set()
