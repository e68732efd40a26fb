"""Optimizers by their name, the schedule of the learning rate, and the loss scale of fp16."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from verl.algorithms.registry import find_function
from verl.config.roles import OptimizerConfig
from verl.engines.dcp_checkpoint import trained_parameters
from verl.utils.user_code import load_function

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
}
# Arguments that are settings of their own; the others are for AdamW alone.
_SETTINGS, _ADAMW_SETTINGS = ("lr", "weight_decay"), ("betas", "eps")


class CombinedOptimizer(Optimizer):
    """Optimizers of different parameters as one, with their states and parameter groups.

    Args:
        parts: the optimizers, before their first step.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        # The very dicts of the parts, so that a schedule of learning rates reaches them.
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state

    @override
    def step(self, closure: Any = None) -> Any:
        """Step every part; a closure is not called."""
        for part in self._parts:
            part.step()


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    fused: bool = True,
    sharded_by: Callable[[Tensor], Hashable] | None = None,
) -> Optimizer:
    """The chosen optimizer over the trained parameters of a model, with decay on matrices only.

    Args:
        model: its embeddings and heads are known by the layers that they belong to.
        config: name, options and rates.
        fused: let AdamW update all weights in one kernel.
        sharded_by: parameters may be parts of a matrix, and those of a group must have the same value of this
            function; None: every parameter is whole.

    Raises:
        ValueError: no such optimizer, an option that it does not have, or parts of matrices with an optimizer
            that needs whole ones.
    """
    if sharded_by is not None and not is_elementwise(config):
        raise ValueError(
            f"need an optimizer that updates each weight by itself for sharded weights, got {config.name}; "
            "take adamw or sgd, or placement=local"
        )
    outer = {id(p) for p in _outer_parameters(model)}
    return _make(
        list(trained_parameters(model).values()),
        config,
        hidden=lambda p: p.ndim == 2 and id(p) not in outer,
        fused=fused,
        key=sharded_by or (lambda p: None),
    )


def _outer_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Weights of embeddings and of heads: layers whose input or output is no hidden state."""
    for name, module in model.named_modules():
        is_head = isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("lm_head", "head", "score")
        if is_head or isinstance(module, nn.Embedding):
            yield from module.parameters()


def _make(
    parameters: Sequence[Tensor],
    config: OptimizerConfig,
    *,
    hidden: Callable[[Tensor], bool],
    fused: bool,
    key: Callable[[Tensor], Hashable] = lambda p: None,
) -> Optimizer:
    name = config.name.lower()
    if name != "muon":
        return _over_groups(parameters, config, name, fused=fused, key=key)
    # The rate of AdamW fits both parts with this scale (Moonlight, https://arxiv.org/abs/2502.16982, 2.2).
    options = {"adjust_lr_fn": "match_rms_adamw"} | config.options.values
    matrices = [p for p in parameters if hidden(p)]
    others = config.model_copy(update={"name": "adamw", "options": type(config.options)()})
    parts = []
    if matrices:
        muon = config.model_copy(update={"options": type(config.options)(**options)})
        parts.append(_over_groups(matrices, muon, name, fused=False, key=key))
    if rest := [p for p in parameters if not hidden(p)]:
        parts.append(_over_groups(rest, others, "adamw", fused=fused, key=key))
    return CombinedOptimizer(parts)


def _over_groups(
    parameters: Sequence[Tensor],
    config: OptimizerConfig,
    name: str,
    *,
    fused: bool,
    key: Callable[[Tensor], Hashable],
) -> Optimizer:
    """One optimizer over groups of parameters: matrices that decay, and vectors that do not."""
    made = (
        load_function(config.name, user="policy.optimizer", keeps_class=True)
        if ":" in name
        else find_function(name, OPTIMIZERS)
    )
    valid = inspect.signature(made).parameters
    options = _checked_options(config, valid)
    if name == "adamw":
        options = {"betas": config.betas, "eps": config.eps, "fused": fused} | options
    decays = "weight_decay" in valid
    if config.weight_decay and not decays:
        raise ValueError(f"need an optimizer with weight_decay, got {config.name}; set weight_decay to 0")
    groups: dict[Hashable, dict[str, Any]] = {}
    # Matrices first, in the order of the model.
    for p in sorted(parameters, key=lambda p: p.ndim < 2):
        decay = {"weight_decay": config.weight_decay if p.ndim >= 2 else 0.0} if decays else {}
        groups.setdefault((p.ndim < 2, key(p)), {"params": [], **decay})["params"].append(p)
    try:
        optimizer = made(list(groups.values()), lr=config.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{config.name} refuses optimizer.options {options}: {error}; correct them"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"need a subclass of torch.optim.Optimizer, got {config.name}; take one")
    return optimizer


def _checked_options(config: OptimizerConfig, valid: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The options of an optimizer; ValueError if it does not have one of them or a setting gives it."""
    own = (*_SETTINGS, *(_ADAMW_SETTINGS if config.name.lower() == "adamw" else ()))
    names = [name for name in list(valid)[1:] if name not in own]
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in valid.values())
    options = config.options.values
    for option in options:
        if option in own:
            raise ValueError(
                f"need {option} of {config.name} as optimizer.{option}, got it in optimizer.options; move it"
            )
        if option not in names and not takes_all:
            near = difflib.get_close_matches(option, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"need optimizer.options of {config.name} ({', '.join(names)}), got {option!r}{hint}"
            )
    return options


def check_optimizer(config: OptimizerConfig, *, setting: str) -> None:
    """Make the optimizer and two steps of it on a small matrix and a vector, before a model is loaded.

    Args:
        config: of a role.
        setting: name of this section, for messages.

    Raises:
        ValueError: there is no such optimizer, its options do not fit, it cannot step with gradients alone,
            or a checkpoint could not hold its state.
    """
    try:
        _after_two_steps(config, [slice(None)])
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def is_elementwise(config: OptimizerConfig) -> bool:
    """True if the optimizer updates each weight by itself: parts of a matrix are updated as the whole one."""
    halves = [slice(0, 2), slice(2, None)]
    return torch.allclose(_after_two_steps(config, [slice(None)]), _after_two_steps(config, halves))


def _after_two_steps(config: OptimizerConfig, parts: Collection[slice]) -> Tensor:
    """A small matrix [4, 3] after two steps on parts of its rows, with the same gradients always."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 4, 3, generator=generator)
    matrices = [nn.Parameter(start[part].clone()) for part in parts]
    vector = nn.Parameter(torch.ones(3))
    optimizer = _make([*matrices, vector], config, hidden=lambda p: p.ndim == 2, fused=False)
    rates = _plain(optimizer)
    for gradient in gradients:
        for matrix, part in zip(matrices, parts, strict=True):
            matrix.grad = gradient[part].clone()
        vector.grad = torch.ones(3)
        try:
            optimizer.step()
        # A border to a user's class: it fails here, before the run, and not in its first update.
        except Exception as error:
            raise ValueError(
                f"{config.name} cannot make a step with gradients alone ({type(error).__name__}: {error}); "
                "take another optimizer"
            ) from error
    kept = [value for state in optimizer.state.values() for value in state.values()]
    if _plain(optimizer) != rates or not all(isinstance(value, Tensor) for value in kept):
        raise ValueError(
            f"need an optimizer whose state is tensors of each parameter, which a checkpoint can hold, got "
            f"{config.name}; take another one"
        )
    return torch.cat([matrix.detach() for matrix in matrices])


def _plain(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Everything in the parameter groups but the parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def lr_factor(update: int, config: OptimizerConfig, total_updates: int) -> float:
    """Learning rate of an update, counted from 0, over the peak.

    Linear warm-up, then a constant rate, or a linear or cosine decay to `min_lr_ratio`.
    """
    if update < config.warmup_steps:
        return (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (update - config.warmup_steps) / max(1, total_updates - config.warmup_steps))
    shape = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class LossScale:
    """Dynamic loss scale: it keeps small fp16 gradients from becoming 0.

    Halved after an overflow, doubled after 2000 updates without one. Mixed precision training,
    https://arxiv.org/abs/1710.03740, section 3.2.

    Args:
        enabled: if False the scale is always 1.
    """

    _START, _DOUBLE_AFTER = 2.0**16, 2000

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = self._START if enabled else 1.0
        self._good_updates = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss for the backward pass."""
        return loss * self.value if self.enabled else loss

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        for gradient in gradients if self.enabled else ():
            gradient.mul_(1 / self.value)

    def update(self, *, is_finite: bool) -> None:
        """Adapt the scale after an update, whose gradient was finite or not."""
        if not self.enabled:
            return
        self._good_updates = self._good_updates + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self._good_updates % self._DOUBLE_AFTER == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"value": self.value, "good_updates": self._good_updates}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of `state_dict`; a scale that is not enabled stays 1."""
        if self.enabled:
            self.value, self._good_updates = float(state["value"]), int(state["good_updates"])
