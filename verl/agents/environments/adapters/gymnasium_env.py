"""Environments of Gymnasium as conversations, `gym:NAME`: states and actions as text.

https://gymnasium.farama.org
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from verl.agents.environments.adapters.text_actions import action_text, marked, named_action, numbers_in
from verl.agents.environments.observation import Observation

_MOVES = ("left", "down", "right", "up")
# Names of the actions of toy environments, by number, from the tables of their own documentation.
_ACTIONS = {
    "FrozenLake": _MOVES,
    "FrozenLake8x8": _MOVES,
    "CliffWalking": ("up", "right", "down", "left"),
    "CliffWalkingSlippery": ("up", "right", "down", "left"),
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Blackjack": ("stick", "hit"),
    "CartPole": ("left", "right"),
    "MountainCar": ("left", "wait", "right"),
    "Acrobot": ("left", "wait", "right"),
}
# Names of the parts of a state that has no drawing.
_PARTS = {
    "Blackjack": ("your sum", "dealer shows", "usable ace"),
    "CartPole": ("position", "velocity", "angle", "angular velocity"),
    "MountainCar": ("position", "velocity"),
    "Pendulum": ("cos(angle)", "sin(angle)", "angular velocity"),
}
_GOALS = {
    "FrozenLake": "You walk over a frozen lake from S to the goal G. F is ice, H is a hole. You are at [ ].",
    "CliffWalking": "You walk from the start to the goal T beside a cliff C. You are at x.",
    "Taxi": "Fetch the passenger with the taxi [ ] and bring them to the destination. R, G, Y, B are places, "
    "| is a wall.",
    "Blackjack": "Come closer to 21 than the dealer, and not over it.",
}
_PLACES = ("R", "G", "Y", "B", "in the taxi")


class GymEnvironment:
    """One episode of an environment of Gymnasium.

    Args:
        name: of the environment, such as FrozenLake-v1, or package:NAME where a package registers it.
        instructions: text before the first state; None: actions and goal.
        actions: names of discrete actions, by number; None: those of the toy environments, else numbers.
        step_limit: steps after which the episode ends; None: the environment's own limit.
        **options: of `gymnasium.make`.
    """

    def __init__(
        self,
        name: str,
        instructions: str | None = None,
        actions: Sequence[str] | None = None,
        step_limit: int | None = None,
        **options: Any,
    ) -> None:
        gymnasium = importlib.import_module("gymnasium")
        module, _, plain_name = name.rpartition(":")
        if module:
            importlib.import_module(module)
        modes = gymnasium.make(plain_name, **options).metadata.get("render_modes", ())
        drawn = {"render_mode": "ansi"} if "ansi" in modes and "render_mode" not in options else {}
        limit = {} if step_limit is None else {"max_episode_steps": step_limit}
        self._environment = gymnasium.make(plain_name, **drawn, **limit, **options)
        self._kind = plain_name.rpartition("-v")[0] or plain_name
        self._instructions, self._spaces = instructions, gymnasium.spaces
        self._actions = self._action_names(actions)

    def reset(self, seed: int) -> str:
        """Goal, actions and the first state."""
        state, _ = self._environment.reset(seed=seed % 2**31)
        if self._instructions is not None:
            return f"{self._instructions}\n\n{self._text_of(state)}"
        goal = next((text for kind, text in _GOALS.items() if self._kind.startswith(kind)), "")
        return f"{goal}\n{self._how_to_act()}\n\n{self._text_of(state)}".lstrip()

    def step(self, message: Mapping[str, Any]) -> Observation:
        """The next state after an action; a turn without one changes nothing, and is told so."""
        try:
            action = self._action(action_text(message))
        except ValueError as error:
            return Observation(f"Error: {error}. {self._how_to_act()}", metrics={"invalid_actions": 1})
        state, reward, is_over, is_cut, _ = self._environment.step(action)
        return Observation(self._text_of(state), float(reward), bool(is_over or is_cut))

    def get_reward(self) -> float:
        """Reward of the episode beside those of its turns."""
        return 0.0

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()

    def _action_names(self, given: Sequence[str] | None) -> tuple[str, ...]:
        space = self._environment.action_space
        if not isinstance(space, self._spaces.Discrete):
            return ()
        names = tuple(given or _ACTIONS.get(self._kind, ())) or tuple(map(str, range(int(space.n))))
        if len(names) != space.n:
            raise ValueError(f"need a name for each of {space.n} actions, got {', '.join(names)}")
        return names

    def _how_to_act(self) -> str:
        if self._actions:
            return f"Actions: {', '.join(self._actions)}. Write one."
        if isinstance(self._environment.action_space, self._spaces.Text):
            return "Write your next action."
        return f"Write your action as {self._num_parts()} numbers."

    def _num_parts(self) -> int:
        space = self._environment.action_space
        return int(space.nvec.size if isinstance(space, self._spaces.MultiDiscrete) else space.shape[0])

    def _action(self, text: str) -> Any:
        """The action in a text; raises ValueError if there is none."""
        space = self._environment.action_space
        if isinstance(space, self._spaces.Text):
            return text
        if self._actions:
            number = named_action(text, self._actions)
            if number is None:
                raise ValueError("there is no action in your message")
            return number + int(space.start)
        numbers = numbers_in(text)[-self._num_parts() :]
        if len(numbers) != self._num_parts():
            raise ValueError(f"need {self._num_parts()} numbers, got {len(numbers)}")
        numpy = importlib.import_module("numpy")
        action = numpy.asarray(numbers, dtype=space.dtype).reshape(space.shape)
        if not space.contains(action):
            raise ValueError(f"the action is outside of {space}")
        return action

    def _text_of(self, state: Any) -> str:
        if isinstance(state, str):
            return state
        inner = self._environment.unwrapped
        if self._kind == "Taxi":
            row, column, passenger, destination = inner.decode(int(state))
            places = f"passenger: {_PLACES[passenger]}, destination: {_PLACES[destination]}"
            return f"{marked(str(self._environment.render()))}\ntaxi: row {row}, column {column}, {places}"
        if self._environment.render_mode == "ansi":
            return marked(str(self._environment.render()))
        if hasattr(inner, "pprint_grid"):  # of MiniGrid
            mission = state["mission"] if isinstance(state, Mapping) and "mission" in state else ""
            return f"{mission}\n{inner.pprint_grid()}".strip()
        return self._described(state)

    def _described(self, state: Any) -> str:
        """The numbers of a state, with the names of its parts where they are known."""
        if isinstance(state, Mapping):
            return "\n".join(f"{name}: {self._described(part)}" for name, part in state.items())
        numpy = importlib.import_module("numpy")
        values = numpy.asarray(state, dtype=object).ravel().tolist() if isinstance(state, tuple) else state
        if isinstance(values, numpy.ndarray):
            values = values.round(4).tolist()
        names = _PARTS.get(self._kind, ())
        if isinstance(values, list) and len(values) == len(names):
            return ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        return str(values)
