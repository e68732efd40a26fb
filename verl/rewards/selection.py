"""Reward functions of each prompt: those of the settings, or those of its row, source or data set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from verl.config.data import RewardsConfig, WeightedChoice
from verl.rewards.data_sources import choices_of, unknown_source
from verl.rewards.execution.isolation import Place
from verl.rewards.library.reward_table import (
    BY_DATA_SOURCE,
    REWARDS,
    check_own_limit,
    checked_options,
    load_function,
)
from verl.rewards.reward_function import RewardFunction
from verl.utils import user_code
from verl.utils.sampling_types import Prompt


class FunctionSelection:
    """Chooses the functions of a prompt, and makes each of them once, when it is first needed.

    A prompt with a function of its own has this one alone. The choice `by_data_source` stands for the
    functions of the prompt's data set. Of two functions with the same name the second is called `name_2`;
    equal choices, with the same options and weight, are one function.

    Args:
        choices: functions of the settings.
        given: functions of the program, added to those of the settings.
        make: makes the function of a choice; raises ValueError for one that cannot be used.

    Attributes:
        functions: all that were made so far, by name, in the order of the settings.
    """

    def __init__(
        self,
        choices: Sequence[WeightedChoice] = (),
        given: Sequence[RewardFunction] = (),
        make: Callable[[WeightedChoice], RewardFunction] | None = None,
    ) -> None:
        self.functions: dict[str, RewardFunction] = {}
        self._make = make
        self._lock = threading.RLock()
        self._names: dict[str, str] = {}  # of the functions of choices, by `_key`
        # A choice in the settings, or the name of its function.
        self._common: list[WeightedChoice | str] = []
        try:
            for choice in choices:
                self._common.append(choice if choice.name == BY_DATA_SOURCE else self._add(choice))
        except BaseException:
            self.close()
            raise
        self._common += [self._name(function) for function in given]

    def names_for(self, prompt: Prompt) -> list[str]:
        """Names of the functions that reward the answers to a prompt; none if nothing does.

        Raises:
            ValueError: a function cannot be used, or its data set is unknown.
        """
        chosen = self._common if prompt.reward is None else [prompt.reward]
        names: list[str] = []
        for choice in chosen:
            names += [choice] if isinstance(choice, str) else self._names_of(choice, prompt)
        return list(dict.fromkeys(names))

    def close(self) -> None:
        """Ends what the functions have started."""
        for function in self.functions.values():
            function.close()

    def _names_of(self, choice: WeightedChoice, prompt: Prompt) -> list[str]:
        """Names of the functions that a choice stands for, of a prompt."""
        if choice.name != BY_DATA_SOURCE:
            return [self._known(choice)]
        found = choices_of(prompt.source)
        if found is None:
            raise ValueError(unknown_source(prompt.source))
        weighted = [c.model_copy(update={"weight": c.weight * choice.weight}) for c in found]
        return [self._known(c) for c in weighted]

    def _known(self, choice: WeightedChoice) -> str:
        key = _key(choice)
        with self._lock:  # Several threads reward at once.
            return self._names[key] if key in self._names else self._add(choice)

    def _add(self, choice: WeightedChoice) -> str:
        assert self._make is not None, "need a maker of functions for choices"
        name = self._name(self._make(choice))
        self._names.setdefault(_key(choice), name)
        return name

    def _name(self, function: RewardFunction) -> str:
        name = unused_name(function.name, self.functions)
        self.functions = {**self.functions, name: function}  # Other threads iterate over it.
        return name


def chosen_function(
    choice: WeightedChoice,
    config: RewardsConfig,
    *,
    placed: Callable[..., Any] | None = None,
    columns: Collection[str] = (),
) -> RewardFunction:
    """The function of a choice, with its options checked; a built-in one is made ready.

    Args:
        choice: name, weight and options.
        config: says where functions of the user run.
        placed: the function, if its model runs elsewhere.
        columns: names of the columns of the data, for messages.

    Raises:
        ValueError: there is no such function, or it does not take these options.
    """
    built_in = REWARDS.get(choice.name)
    function, options = placed or load_function(choice.name), choice.options
    imported_from, check, score_of_failure = choice.name, None, None
    place: Place | None = "thread" if config.isolation == "thread" else None
    if built_in:
        if not placed:
            options = checked_options(choice.name, function, options)
            check_own_limit(choice.name, function, options, config.timeout_s)
        imported_from = built_in.function
        # One for a process holds nothing that it could share, and relies on its limits.
        place = None if built_in.place == "process" else built_in.place
        if built_in.check:
            check = partial(load_function(built_in.check), **options)
        if built_in.score_of_failure:
            score_of_failure = load_function(built_in.score_of_failure)
    module, _, attribute = imported_from.rpartition(":")
    made = RewardFunction(
        function,
        name=choice.name if built_in else None,
        weight=choice.weight,
        options=options,
        imported_from=(module, attribute),
        place="thread" if placed else place,
        check=check,
        score_of_failure=score_of_failure,
        columns=columns,
    )
    if built_in and built_in.prepare and not placed:
        load_function(built_in.prepare)(**options)
    return made


def built_function(
    choice: WeightedChoice, *, folder: Path | None, note: Callable[[str], None]
) -> RewardFunction:
    """The built-in function with state of a choice.

    Args:
        choice: name, weight and options.
        folder: of the run's files; None: there is none.
        note: called with sentences for the user.

    Raises:
        ValueError: it does not take these options.
    """
    user = f"reward function {choice.name}"
    build = user_code.load_function(REWARDS[choice.name].build, user=user, keeps_class=True)
    try:
        made = build(choice.options, folder=folder, note=note)
    except ValueError as error:
        raise ValueError(f"reward function {choice.name!r}: {error}") from error
    return RewardFunction(
        made, name=choice.name, weight=choice.weight, place="inline", check=made.check, close=made.close
    )


def unused_name(name: str, taken: Iterable[str]) -> str:
    """The name, or with a number behind it, so that no other has it."""
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _key(choice: WeightedChoice) -> str:
    return repr((choice.name, choice.weight, sorted(choice.options.items())))
