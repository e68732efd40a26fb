"""Environments by their names: classes of the user, factories, and adapters to the packages of others."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from verl.config.fields import Choice
from verl.data.tasks.bfcl_tasks import INSTALL as BFCL_INSTALL

_ADAPTERS = "verl.agents.environments.adapters"


@dataclass(frozen=True)
class Adapter:
    """A module of ours that gives the environments of a package the contract of a class.

    Attributes:
        definition: "module:Class"; the class gets the name behind the colon, and the options.
        package: that the module imports.
        preload: "module:function", imported before processes are forked.
        install: command that installs it.
    """

    definition: str
    package: str
    preload: str
    install: str


ADAPTERS: dict[str, Adapter] = {
    "bfcl": Adapter(
        f"{_ADAPTERS}.bfcl_env:BfclEnvironment",
        "bfcl_eval",
        "bfcl_eval.eval_checker.multi_turn_eval.func_source_code.math_api:MathAPI",
        BFCL_INSTALL,
    ),
    "gym": Adapter(
        f"{_ADAPTERS}.gymnasium_env:GymEnvironment", "gymnasium", "gymnasium:make", "pip install 'verl[gym]'"
    ),
    "openenv": Adapter(
        f"{_ADAPTERS}.openenv_env:OpenEnvEnvironment",
        "openenv",
        "openenv:GenericEnvClient",
        "pip install 'verl[openenv]'",
    ),
    "reasoning-gym": Adapter(
        f"{_ADAPTERS}.reasoning_gym_env:ReasoningGymEnvironment",
        "reasoning_gym",
        "reasoning_gym:create_dataset",
        "pip install 'verl[reasoning-gym]'",
    ),
    "skyrl-gym": Adapter(
        f"{_ADAPTERS}.skyrl_env:SkyrlEnvironment",
        "skyrl_gym",
        "skyrl_gym:make",
        "pip install 'verl[skyrl-gym]'",
    ),
    "textarena": Adapter(
        f"{_ADAPTERS}.textarena_env:TextArenaEnvironment",
        "textarena",
        "textarena:make",
        "pip install 'verl[textarena]'",
    ),
    "verifiers": Adapter(
        f"{_ADAPTERS}.verifiers_env:VerifiersEnvironment",
        "verifiers",
        f"{_ADAPTERS}.verifiers_preload:has_load_environment",
        "pip install 'verl[verifiers]'",
    ),
}


@dataclass(frozen=True, eq=False)
class EnvironmentChoice:
    """One environment with its options.

    Attributes:
        name: for messages.
        definition: "file.py:Class", "package.module:Class", or the class or factory itself.
        options: keyword arguments of the class or factory.
        preload: "package:function" that it uses, imported before processes are forked; "": none.
        python: interpreter of its processes; None: that of the trainer.
    """

    name: str
    definition: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    preload: str = ""
    python: str | None = None

    @property
    def place(self) -> tuple[str | int, str | None]:
        """Key of the processes that can hold the environment, whatever its options are."""
        return (self.definition if isinstance(self.definition, str) else id(self.definition), self.python)

    @property
    def key(self) -> tuple[object, ...]:
        """Key of the same environment with any options."""
        return (self.name, *self.place)


def chosen_environment(choice: Choice) -> EnvironmentChoice:
    """The environment of a setting or of a row.

    Raises:
        ValueError: there is none of this name, or its package is missing.
    """
    options = choice.options
    python = options.pop("python", None)
    if python is not None and shutil.which(python := os.path.expanduser(python)) is None:
        raise ValueError(f"need an interpreter as the option python of {choice.name}, there is no {python}")
    kind, colon, name = choice.name.partition(":")
    if kind in ADAPTERS and colon:
        adapter = ADAPTERS[kind]
        if python is None and importlib.util.find_spec(adapter.package) is None:
            raise ValueError(
                f"the environment {choice.name} needs the package {adapter.package}: {adapter.install}, or "
                "name an interpreter that has it in the option python"
            )
        return EnvironmentChoice(
            choice.name, adapter.definition, {"name": name, **options}, adapter.preload, python
        )
    if not colon:
        forms = [f"{kind}:NAME" for kind in ADAPTERS]
        near = difflib.get_close_matches(choice.name, ADAPTERS, n=1)
        hint = f"; did you mean {near[0]}:NAME?" if near else ""
        raise ValueError(
            'need an environment as "file.py:Class", "package.module:Class" or one of '
            f"{', '.join(forms)}, got {choice.name!r}{hint}"
        )
    return EnvironmentChoice(choice.name, choice.name, options, python=python)


def given_environment(given: Callable[..., Any]) -> EnvironmentChoice:
    """The environment of a class or factory of the program.

    Raises:
        ValueError: it is none.
    """
    if not callable(given):
        raise ValueError(
            f"need a class or a function that makes the environment, got {given!r}; hand over the class and "
            "not an object of it, since each episode has its own"
        )
    return EnvironmentChoice(getattr(given, "__name__", type(given).__name__), given)


def row_environment(value: Any, column: str, *, given: Mapping[str, EnvironmentChoice]) -> EnvironmentChoice:
    """The environment that a row names.

    Args:
        value: name, {name, options} or {name, OPTION: value, ...}, or the JSON text of such a mapping.
        column: of the value, for messages.
        given: environments of the program and of `agent.environment`, by name; a row may name any of them.

    Raises:
        ValueError: it is none, or code that only the settings may name.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"need an environment in the column {column!r}, got {value!r}: {error}"
            ) from None
    named = {"name": value} if isinstance(value, str) else value
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise ValueError(
            f"need an environment by name, or {{name, options}}, in the column {column!r}, got {value!r}"
        )
    own = dict(named)
    name = own.pop("name")
    # Tables fill the cells of options that a row does not have.
    options = {k: v for k, v in {**(own.pop("options", None) or {}), **own}.items() if v is not None}
    if name in given:
        known = given[name]
        return replace(known, options={**known.options, **options})
    kind = name.partition(":")[0]
    # Data must not choose which code is run.
    if kind not in ADAPTERS or "python" in options:
        raise ValueError(
            f"need an adapter ({', '.join(ADAPTERS)}) or an environment that the settings name, in the "
            f"column {column!r}, got {name!r}; name it in agent.environment, or hand it to the trainer"
        )
    return chosen_environment(Choice.model_validate({**options, "name": name}))
