"""Environments of SkyRL-gym, `skyrl-gym:NAME`: `init`, and `step` with a reward for each turn.

https://github.com/NovaSky-AI/SkyRL/tree/main/skyrl-gym
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from verl.agents.environments.observation import Observation, is_number


class SkyrlEnvironment:
    """One episode of a text environment of SkyRL-gym.

    Args:
        name: under which it is registered, such as gsm8k_multi_turn, or "package.module:Class".
        env_config: its own settings.
        **extras: given to it beside the columns of the row, such as max_turns.
    """

    def __init__(self, name: str, env_config: Mapping[str, Any] | None = None, **extras: Any) -> None:
        self._gym = importlib.import_module("skyrl_gym")
        self._config = importlib.import_module("omegaconf").OmegaConf.create(dict(env_config or {}))
        self._name, self._extras = name, extras
        self._environment: Any = None

    def reset(self, prompt: Any, answer: Any = None, **columns: Any) -> Observation:
        """Messages of the prompt, as the environment's `init` gives them."""
        extras = {"extra_info": {}, **columns, **self._extras}
        if answer is not None:
            for name in ("reward_spec", "reward_model"):  # its environments name it so or so
                extras.setdefault(name, {"method": "rule", "ground_truth": answer})
        if ":" in self._name:
            module, _, kind = self._name.partition(":")
            make = getattr(importlib.import_module(module), kind)
            self._environment = make(env_config=self._config, extras=extras)
        else:
            self._environment = self._gym.make(self._name, env_config=self._config, extras=extras)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        first, _ = self._environment.init([dict(message) for message in messages])
        return Observation() if first == messages else Observation(messages=first, replaces_prompt=True)

    def step(self, message: Mapping[str, Any]) -> Observation:
        """Observations and reward of a turn."""
        result = self._environment.step(str(message["content"] or ""))
        metrics = {n: float(v) for n, v in (result.get("metadata") or {}).items() if is_number(v)}
        return Observation(
            reward=float(result["reward"]),
            is_over=bool(result["done"]),
            metrics=metrics,
            messages=result["observations"],
        )

    def get_reward(self) -> float:
        """Reward of the episode beside those of its turns."""
        return 0.0

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
