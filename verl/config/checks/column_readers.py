"""Columns of a batch that decide which models a run needs, and the built-in functions that read them."""

from __future__ import annotations

from verl.config.run import TrainerConfig

# Written by hand: settings load without PyTorch, so the signatures cannot be inspected here. A test compares.
COLUMN_READERS: dict[str, tuple[str, ...]] = {
    "group_ids": (
        "grpo",
        "grpo_batch_std",
        "rloo",
        "opo",
        "gpg",
        "maxrl",
        "grpo_passk",
        "gdpo",
        "reinforce_pp_baseline",
        "optimal_token_baseline",
        "grpo_turns",
        "gigpo",
        "prime",
        "online_dpo",
    ),
    "values": ("gae", "vapo_gae"),
    "ref_logprobs": ("prime", "online_dpo"),
    "prm_logprobs": ("prime",),
    "teacher_logprobs": ("reverse_kl",),
    "teacher_top_logprobs": ("forward_kl_topk",),
    "greedy_rewards": ("remax",),
    "states": ("gigpo",),
}


def reads(config: TrainerConfig, *columns: str) -> bool:
    """True if a built-in advantage, policy loss or correction was chosen that reads one of the columns."""
    a = config.algorithm
    chosen = {choice.name for choice in (a.advantage, a.policy_loss, a.correction)}
    return any(chosen & set(COLUMN_READERS[column]) for column in columns)


def may_read(config: TrainerConfig, *columns: str) -> bool:
    """True if `reads` is, or a chosen function is the user's own, which may read any column."""
    a = config.algorithm
    chosen = [choice.name for choice in (a.advantage, a.policy_loss, a.correction)]
    return any(":" in name for name in chosen) or reads(config, *columns)
