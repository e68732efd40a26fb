"""Classes of the settings for programs that import them from here; they are defined in `verl.config`."""

from verl.config.data import DataConfig, PairsDataConfig, RewardsConfig
from verl.config.run import PreferenceConfig, RewardModelConfig, SFTConfig, TrainerConfig

__all__ = [
    "DataConfig",
    "PairsDataConfig",
    "PreferenceConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "SFTConfig",
    "TrainerConfig",
]
