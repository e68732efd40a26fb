"""Settings of a run: recipes, YAML files, overrides and the flat call."""

from verl.config.flat_call import make_trainer_config
from verl.config.layers import RECIPES
from verl.config.loader import load_config, load_run, load_sft_config, to_yaml
from verl.config.yaml_text import ConfigError

__all__ = [
    "RECIPES",
    "ConfigError",
    "load_config",
    "load_run",
    "load_sft_config",
    "make_trainer_config",
    "to_yaml",
]
