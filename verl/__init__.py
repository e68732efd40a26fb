"""Reinforcement-learning post-training of language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from verl.agents.collector import DataCollector
    from verl.config.flat_call import make_trainer_config
    from verl.rewards.scoring import score_answers
    from verl.trainer.rl_trainer import Trainer
    from verl.trainer.run.callbacks import Callback

# Imported at first use (PEP 562): reading the version or the settings never loads torch.
_LAZY = {
    "Callback": "verl.trainer.run.callbacks",
    "DataCollector": "verl.agents.collector",
    "Trainer": "verl.trainer.rl_trainer",
    "make_trainer_config": "verl.config.flat_call",
    "score_answers": "verl.rewards.scoring",
}

__all__ = ["Callback", "DataCollector", "Trainer", "__version__", "make_trainer_config", "score_answers"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'verl' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
