"""Layers with a recurrent state (linear attention, state spaces, short convolutions) that read rows.

Such a layer of Transformers passes a state along its sequence, so packed rows are taken apart before it and
packed again behind it. In generation its state after the last token is kept beside the keys and values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer
from typing_extensions import override

from verl.engines.hf.row_layouts import DecodeLayout, ExtendLayout, RowLayout, current_layout

# In shapes: B rows, S positions of a row, N packed positions, A rows that decode, G rows of one length.
_NO_LIMIT = (0.0, math.inf)
_CACHE_NAMES = ("cache_params", "past_key_values")


class LayerState(LinearAttentionLayer):
    """States of one recurrent layer, as the code of Transformers reads and writes them."""

    def __init__(self, number_of_states: int, states: dict[tuple[str, int], Tensor] | None = None) -> None:
        super().__init__(number_of_states=number_of_states)
        for (kind, number), state in (states or {}).items():
            getattr(self, f"{kind}_states")[number] = state
            getattr(self, f"is_{kind}_states_initialized")[number] = True
            self.has_previous_state[number] = True
            if kind == "conv":
                self.conv_kernel_size[number] = state.shape[-1]

    @override
    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        # That of Transformers also marks addresses for CUDA graphs, which imports PyTorch's compiler.
        if conv_states is not None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            self.conv_states[state_idx] = conv_states.new_zeros(*conv_states.shape[:-1], size)
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    def states(self) -> dict[tuple[str, int], Tensor]:
        """All states [rows, ...] by kind and number."""
        kinds = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        return {
            (kind, number): state
            for kind, numbered in kinds.items()
            for number, state in numbered.items()
            if state is not None
        }


class RecurrentForward:
    """Replaces the forward method of a recurrent layer: rows by the current layout, or as before without one.

    Args:
        module: the layer.
        number_of_states: convolutions or recurrences of the layer that have a state each.
    """

    def __init__(self, module: nn.Module, number_of_states: int) -> None:
        self.module = module
        self.layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.number_of_states = number_of_states
        self.own: Callable[..., Any] = module.forward
        names = list(inspect.signature(module.forward).parameters)
        self.input_name = names[0]
        self.cache_name = next(name for name in _CACHE_NAMES if name in names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the layer: [1, N, hidden], [B, S, hidden] or [A, 1, hidden], as its input."""
        layout = current_layout()
        if layout is None:
            return self.own(*args, **kwargs)
        states: Tensor = args[0] if args else kwargs[self.input_name]
        if isinstance(layout, DecodeLayout):
            return self.over_cache(states, layout)
        if isinstance(layout, ExtendLayout):
            raise ValueError("need whole rows for layers with a recurrent state, got rows behind a prefix")
        if layout.sequence is not None:
            raise ValueError(
                "need the whole packed sequence on each rank for layers with a recurrent state; "
                "set placement sequence=1"
            )
        return self.over_rows(states, layout)

    def over_rows(self, states: Tensor, layout: RowLayout) -> Tensor:
        """Each row by itself, and its last state into the cache, if there is one."""
        rows = layout.pad(states) if layout.packed else states
        if layout.cache is None or layout.slots is None:
            # Rows are right-padded: no real token sees padding.
            out = self.own(rows)
        else:
            out = torch.zeros_like(rows)
            lengths = torch.tensor(layout.lengths, device=rows.device)
            # The state is that after the last position, so only rows of one length are computed together.
            for length in sorted(set(layout.lengths)):
                own = (lengths == length).nonzero().squeeze(1)
                layer = LayerState(self.number_of_states)
                out[own, :length] = self.call(rows[own, :length], layer).to(out.dtype)
                for (kind, number), state in layer.states().items():
                    layout.cache.put_state((self.layer, kind, number), layout.slots[own], state)
        return layout.unpad(out) if layout.packed else out

    def over_cache(self, states: Tensor, layout: DecodeLayout) -> Tensor:
        """One new token of each row, whose states in the cache are replaced by the next ones."""
        slots = layout.cache.layer_states(self.layer)
        num_rows = len(layout.positions)
        views = {key: state[:num_rows] for key, state in slots.items()}
        layer = LayerState(self.number_of_states, views)
        with self.limited_time_steps():
            out = self.call(states, layer)
        for key, state in layer.states().items():
            if state is not views[key]:  # most layers have written into the views
                views[key].copy_(state)
        return out

    @contextmanager
    def limited_time_steps(self) -> Iterator[None]:
        """Context in which a Mamba-2 layer limits its time steps in decoding, too.

        Transformers applies `time_step_limit` to whole rows alone, so one token would be computed otherwise
        than in training. The time steps are the last part of the projection, before their bias and softplus.
        """
        limit = getattr(self.module, "time_step_limit", None) or _NO_LIMIT
        if tuple(limit) == _NO_LIMIT:
            yield
            return
        if hasattr(self.module, "mup_vector"):
            raise ValueError(f"need time_step_limit {_NO_LIMIT} in config.json for decoding, got {limit}")
        bias: Tensor = self.module.dt_bias  # type: ignore[assignment]
        least, most = (torch.tensor(float(x), device=bias.device).expm1().log() for x in limit)

        def clamp(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            others, steps = output.tensor_split([output.shape[-1] - len(bias)], -1)
            return torch.cat([others, (steps + bias).clamp(least, most) - bias], -1).to(output.dtype)

        handle = self.module.get_submodule("in_proj").register_forward_hook(clamp)
        try:
            yield
        finally:
            handle.remove()

    def call(self, rows: Tensor, layer: LayerState) -> Tensor:
        """Output of the layer for rows [G, S, hidden], which reads and writes `layer`."""
        # Transformers finds the states by the number of the layer.
        cache = Cache(layers=[layer] * (self.layer + 1))
        out: Tensor = self.own(rows, **{self.cache_name: cache})
        return out


def is_recurrent(module: nn.Module) -> bool:
    """True for a layer that has a convolution of its own and takes a cache for its state."""
    if isinstance(module.forward, RecurrentForward):
        return True
    has_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
    if not has_convolution or not isinstance(getattr(module, "layer_idx", None), int):
        return False
    names = inspect.signature(module.forward).parameters
    return any(name in names for name in _CACHE_NAMES)


def recurrent_layers(transformer: nn.Module) -> list[nn.Module]:
    """Layers with a recurrent state."""
    return [module for module in transformer.modules() if is_recurrent(module)]


def read_by_rows(transformer: PreTrainedModel) -> None:
    """Let the recurrent layers of a model read rows as the current layout says, in place; once per model."""
    layers = [
        module for module in recurrent_layers(transformer) if not isinstance(module.forward, RecurrentForward)
    ]
    if not layers:
        return
    config: PretrainedConfig = transformer.config.get_text_config()
    numbers = [getattr(state, "number_of_states", 1) for state in DynamicCache(config=config).layers]
    for module in layers:
        number = numbers[int(module.layer_idx)]  # type: ignore[arg-type]
        # The attribute hides the method of the class; hooks run as before.
        module.forward = RecurrentForward(module, number)
