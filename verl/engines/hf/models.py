"""Hugging Face models in and out: the policy as hidden states and logits, value and reward models, and small
models of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
)
from typing_extensions import override

from verl.data.batch import ModelInput
from verl.engines.hf.attention import DecodeLayout, RowLayout, use_attention
from verl.engines.sequence_parallel import SequenceGroup
from verl.utils.device import autocast

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")


class Backbone(nn.Module):
    """A causal transformer that reads rows; one forward function for training, prefill and decoding.

    Attributes:
        transformer: the Hugging Face model; its weights are fp32 and shared by everyone who holds this
            object.
        precision: arithmetic of the forward pass.
        sequence: the ranks that share the line of packed rows in training; none: this one has it whole.
        compute_device: where it computes, if its weights rest elsewhere.
    """

    _compared = "states"
    sequence: SequenceGroup | None = None
    compute_device: torch.device | None = None

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__()
        self.transformer = transformer
        self.precision: Precision = precision
        # Dropout would make the sampler and the trainer two different policies.
        for module in transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
            if name in transformer.config.to_dict():
                setattr(transformer.config, name, 0.0)

    def forward(self, call: Callable[[], T]) -> T:
        """What `call` returns: every use of the weights goes through here, so that sharding sees where it
        begins and ends.
        """
        return call()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.compute_device or next(self.parameters()).device

    @contextmanager
    def forward_mode(self) -> Iterator[None]:
        """Inside the block the forward pass attends by rows and runs in its precision.

        Weights that the precision casts are cast once per block, so generation enters it once for all tokens.
        """
        with use_attention(self.transformer), autocast(self.device, self.precision):
            yield

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, layout: RowLayout | DecodeLayout
    ) -> Tensor:
        """Final hidden states, [..., hidden], of ids and positions [...] in the given layout; needs `forward_mode`."""
        base = self.transformer.base_model
        return base(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout
        ).last_hidden_state

    def predictor_states(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """The states that predict response tokens; needs `forward_mode`.

        Returns:
            [m, hidden], and which of the M response tokens of all rows they are for, [m]; None: for all.
        """
        layout, ids, positions = (
            RowLayout.from_inputs(inputs, self.sequence),
            inputs.input_ids,
            inputs.position_ids,
        )
        if self.sequence is None:
            return self.hidden_states(ids, positions, layout).flatten(0, 1).index_select(
                0, inputs.predictors
            ), None
        own, places = self.sequence.local_indices(inputs.predictors, layout.num_places)
        states = self.hidden_states(
            self.sequence.local_slice(ids), self.sequence.local_slice(positions), layout
        )
        return states[0].index_select(0, places), own

    def gather_tokens(self, values: Tensor, own: Tensor | None, inputs: ModelInput) -> Tensor:
        """[M, ...] from what was made of `predictor_states`."""
        if own is None or self.sequence is None:
            return values
        return self.sequence.gather_tokens(values, own, len(inputs.targets))

    def zero_loss(self, inputs: ModelInput) -> Tensor:
        """A 0 whose gradient, 0 too, reaches every weight that takes part in `inputs`: a forward pass for
        company.
        """
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Gradient checkpointing: activations of a layer are recomputed in the backward pass, inside or
        outside `forward_mode`.
        """
        kwargs = {
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), use_attention(self.transformer)),
        }
        self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    @torch.no_grad()
    def check_forward(self) -> None:
        """Compares our forward pass with the model's own on a few tokens, and our windows with its
        configuration.

        Raises:
            ValueError: they differ, so the family does something that this forward pass does not know.
        """
        ids = (
            torch.arange(4, 12, device=self.device)[None]
            % self.transformer.config.get_text_config().vocab_size
        )
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        # Eager is the family's definition; PyTorch's attention leaves out Gemma 2's cap.
        with use_attention(self.transformer, "eager"):
            own = self._own_outputs(ids, positions)[0].float()
        packed = torch.cat([ids, ids], 1)
        layout = RowLayout([ids.shape[1]] * 2, True, self.device)
        try:
            with use_attention(self.transformer):
                states = self.hidden_states(packed, torch.cat([positions, positions], 1), layout)[0]
                ours = self._outputs(states)
        except (
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # its code does not expect to be called like this
            raise self._not_by_rows(f"{type(error).__name__}: {error}") from error
        difference = max(float((part - own).abs().max()) for part in ours.split(ids.shape[1]))
        # Weights that are sharded for 16 bits compute in them here, too, and round as they do.
        tolerance = 1e-3 if states.dtype == torch.float32 else 3e-2
        if not difference <= tolerance * max(1.0, float(own.abs().max())):
            raise self._not_by_rows(
                f"its {self._compared} differ by {difference:.2g} from its own forward pass"
            )
        # The few tokens above are shorter than most windows.
        if untold := [layer for layer in self._windowed_layers() if layout.windows.get(layer) is None]:
            raise self._not_by_rows(f"the attention of layer {untold[0]} is not told its window")

    def _windowed_layers(self) -> list[int]:
        """Layers that, as configured, do not see the whole row."""
        config = self.transformer.config.get_text_config().to_dict()
        if config.get("layer_types"):
            return [layer for layer, kind in enumerate(config["layer_types"]) if kind != "full_attention"]
        short = 0 < (config.get("sliding_window") or 0) < config["max_position_embeddings"]
        return list(range(config["num_hidden_layers"])) if short else []

    def _own_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """What the family's own forward pass makes of them, to be compared with `_outputs`."""
        return self.transformer.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def _outputs(self, states: Tensor) -> Tensor:
        return states.float()

    def _not_by_rows(self, why: str) -> ValueError:
        return ValueError(
            f"model family {self.transformer.config.model_type!r} cannot be run by rows: {why}; "
            "use a family that attends through the Transformers attention interface, such as Qwen2, Qwen3, Llama, Mistral or Gemma"
        )


Reduce = Callable[..., tuple[Tensor, ...]]


def target_logprobs(log_probs: Tensor, targets: Tensor) -> Tensor:
    """[m] of [m, V], at the ids [m]."""
    return log_probs.gather(1, targets[:, None]).squeeze(1)


def entropies(log_probs: Tensor, *, with_grad: bool) -> Tensor:
    """[m] of [m, V], nats."""
    with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
        return -(log_probs.exp() * log_probs).sum(-1)


class PolicyModel(Backbone):
    """A causal language model as a policy: hidden states, logits, logprobs."""

    _compared = "logits"

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__(transformer, precision)
        self._softcap: float | None = transformer.config.to_dict().get("final_logit_softcapping")

    def logits(self, states: Tensor) -> Tensor:
        """[M, V] fp32 from states [M, hidden]."""
        logits = self.transformer.get_output_embeddings()(states).float()
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def reduce_vocab(
        self, inputs: ModelInput, reduce: Reduce, *columns: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, ...]:
        """What `reduce` makes of the distribution at the place of every response token, at a temperature > 0.

        The logits of `chunk` positions are in memory at a time; with more positions they are recomputed
        backward.

        Args:
            inputs: rows with M response tokens.
            reduce: takes logprobs of the whole vocabulary [m, V], sampled ids [m] and the columns' parts [m,
                ...].
            columns: [M, ...] for `reduce`.
            temperature: logits are divided by it.
            chunk: largest m.

        Returns:
            Each result of `reduce` for all M places.
        """
        states, own = self.predictor_states(inputs)
        rows = (states, *(column if own is None else column[own] for column in (inputs.targets, *columns)))

        def of_chunk(states: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            return reduce(torch.log_softmax(self.logits(states) / temperature, -1), *others)

        if len(states) <= chunk:
            results = of_chunk(*rows)
        else:
            chunks = zip(*(row.split(chunk) for row in rows), strict=True)
            parts = [checkpoint(of_chunk, *part, use_reentrant=False) for part in chunks]
            results = tuple(torch.cat(result) for result in zip(*parts, strict=True))
        return tuple(self.gather_tokens(result, own, inputs) for result in results)

    @override
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        return 0 * self.logits(self.predictor_states(inputs)[0]).sum()

    def token_logprobs(
        self, inputs: ModelInput, *, temperature: float, chunk: int, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logprobs of the response tokens and entropies of their distributions, [M] fp32 each; see `reduce_vocab`."""

        def of_sampled(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return target_logprobs(log_probs, targets), entropies(log_probs, with_grad=entropy_grad)

        logprobs, entropy = self.reduce_vocab(inputs, of_sampled, temperature=temperature, chunk=chunk)
        return logprobs, entropy

    def _own_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.transformer(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    def _outputs(self, states: Tensor) -> Tensor:
        return self.logits(states)


class ValueModel(Backbone):
    """A transformer with a scalar head: the value of the state before each response token."""

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__(transformer, precision)
        # Zero: the first values are those of a critic that knows nothing, whatever the size of the states.
        self.head = nn.Linear(transformer.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def token_values(self, inputs: ModelInput) -> Tensor:
        """[M] fp32, one value per response token."""
        states, own = self.predictor_states(inputs)
        return self.gather_tokens(self.head(states).squeeze(-1).float(), own, inputs)

    @override
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        return 0 * self.token_values(inputs).sum()


class RewardModel(Backbone):
    """A model of Transformers for sequence classification with one label: what an answer is worth, read at
    its last token.

    An answer must be followed by one token of any kind: the last token of a row is not read, see
    `ModelInput`.
    """

    @property
    def pad_id(self) -> int | None:
        """The token that Transformers takes for padding; it reads a score at the last token that is another."""
        pad_id: int | None = self.transformer.config.get_text_config().pad_token_id
        return pad_id

    def set_default_pad_id(self, pad_id: int | None) -> None:
        """Sets it where the configuration has none."""
        if self.pad_id is None:
            self.transformer.config.get_text_config().pad_token_id = pad_id

    def token_scores(self, inputs: ModelInput) -> Tensor:
        """[M] fp32: of each row up to the token before each response token."""
        states, own = self.predictor_states(inputs)
        # In fp32: the difference of two scores of 5 would have two digits in bf16.
        with torch.autocast(states.device.type, enabled=False):
            scores = self.transformer.get_submodule("score")(states.float()).squeeze(-1)
        return self.gather_tokens(scores, own, inputs)

    @override
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        return 0 * self.token_scores(inputs).sum()
