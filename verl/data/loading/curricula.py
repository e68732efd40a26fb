"""The table of curricula, and the sampler that `data.curriculum` chooses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from verl.config.checks.function_options import check_names, check_values, option_parameters
from verl.config.fields import Choice
from verl.config.layers import nearest_key
from verl.data.loading.pass_rate import PassRateWindow
from verl.data.loading.prompt_sampler import EasyToHard, EpochSampler, PromptSampler
from verl.utils.sampling_types import Prompt
from verl.utils.user_code import load_function

CURRICULA: dict[str, type[PromptSampler]] = {
    "off": EpochSampler,
    "pass_rate": PassRateWindow,
    "easy_to_hard": EasyToHard,
}


def build_sampler(
    curriculum: Choice, prompts: Sequence[Prompt], *, seed: int, shuffle: bool
) -> PromptSampler:
    """The sampler of some prompts.

    Args:
        curriculum: name in `CURRICULA`, or "package.module:Class" or "file.py:Class" of a subclass of
            `PromptSampler`; with options.
        prompts: to draw from.
        seed: of random choices.
        shuffle: `data.shuffle`.

    Raises:
        ValueError: there is no such sampler, or it does not take the options.
    """
    name = curriculum.name
    if ":" not in name and name not in CURRICULA:
        raise ValueError(
            f'need data.curriculum as one of {", ".join(CURRICULA)} or as "file.py:Class", got {name!r}; the '
            f"nearest is {nearest_key(name, list(CURRICULA))}"
        )
    found = CURRICULA[name] if name in CURRICULA else load_function(name, user="curriculum", keeps_class=True)
    if not (isinstance(found, type) and issubclass(found, PromptSampler)):
        raise ValueError(
            "need a subclass of verl.data.loading.prompt_sampler.PromptSampler for data.curriculum, got "
            f"{name}"
        )
    user, options = f"data.curriculum {name}", curriculum.options
    parameters = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_names(user, option_parameters(found, without=("seed", "shuffle")), options)
    if name in CURRICULA:
        options = check_values(user, found.__init__, options)
    try:
        return found(prompts, seed=seed, shuffle=shuffle, **options)
    except TypeError as error:
        raise ValueError(f"{user} cannot be made of {options}: {error}; correct its options") from error
