"""Hugging Face transformers as policies, value models and reward models that read rows."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from typing_extensions import override

from verl.data.batch import ModelInput
from verl.engines.hf.attention import use_attention
from verl.engines.hf.families import base_of, context_length, family_logits
from verl.engines.hf.forward_check import CheckedForward
from verl.engines.hf.lora import adapter_of, policy_name, use_adapter
from verl.engines.hf.recurrent import read_by_rows
from verl.engines.hf.row_layouts import Layout, RowLayout, current_layout, use_layout
from verl.engines.memory_limits import logits_chunk_tokens
from verl.engines.sequence_parallel import SequenceGroup
from verl.utils.device import autocast

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")
# In shapes: M response tokens, m of them on this rank or in a chunk, V vocabulary.
# Tensors from the vocabulary logprobs [m, V], the sampled ids [m] and more columns [m, ...].
Reduce = Callable[..., tuple[Tensor, ...]]


class Backbone(CheckedForward):
    """A causal transformer with one forward pass for training, prefill and decoding.

    Attributes:
        transformer: the Hugging Face model. Its weights are fp32 and shared by all users of this object.
        precision: arithmetic of the forward pass.
        adapter: the LoRA adapter of the transformer that this model computes with, "": none of them; None: it
            has none.
        sequence: the ranks that share the packed sequence in training; None: it is whole on this rank.
        compute_device: device of the computation, if the weights are stored on another one.
    """

    sequence: SequenceGroup | None = None
    compute_device: torch.device | None = None
    adapter: str | None = None

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__()
        self.transformer = transformer
        self.precision: Precision = precision
        read_by_rows(transformer)
        # With dropout the sampler and the trainer would be two different policies.
        for module in transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in [name for name in vars(module) if "dropout" in name or name == "layerdrop"]:
                if isinstance(getattr(module, name), float):
                    setattr(module, name, 0.0)
        for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
            if name in transformer.config.to_dict():
                setattr(transformer.config, name, 0.0)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of this model that are not frozen, by name; its adapter is named as that of a policy."""
        own = (self.adapter, "")
        return {
            policy_name(name): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and adapter_of(name) in own
        }

    @override
    def train(self, mode: bool = True) -> Backbone:
        """Set training mode only where it decides if activations are recomputed.

        In other modules it means noise: jitter of routers, dropout, weights that are clipped.
        """
        is_by_transformers = isinstance(self.transformer, PreTrainedModel)
        super().train(mode and not is_by_transformers)
        self.training = mode
        for module in self.transformer.modules():
            if is_by_transformers and getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def forward(self, call: Callable[[], T]) -> T:
        """The result of `call`; every use of the weights goes through here, so that FSDP's hooks run."""
        return call()

    @property
    def context(self) -> int:
        """Tokens of the longest row."""
        return context_length(self.transformer.config)

    @cached_property
    def _takes_positions(self) -> bool:
        """False if the family has no positions of tokens, such as Mamba."""
        return "position_ids" in inspect.signature(base_of(self.transformer).forward).parameters

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.compute_device or next(self.parameters()).device

    @contextmanager
    def forward_mode(self) -> Iterator[None]:
        """Context in which the model attends by rows and computes in its precision.

        Weights are cast to the precision once per context, so generation enters it once for all tokens. The
        adapter stays in use afterwards: a backward pass may compute activations again.
        """
        if self.adapter is not None:
            use_adapter(self.transformer, self.adapter)
        with use_attention(self.transformer), autocast(self.device, self.precision):
            yield

    @override
    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        with use_layout(layout):
            return self.family_states(input_ids, position_ids)

    def predictor_states(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Hidden states that predict response tokens; needs `forward_mode`.

        Returns:
            States [m, hidden] of the tokens on this rank, and the indices [m] of these among the M response
            tokens of all rows; None: the states are of all tokens.
        """
        layout, ids, positions = (
            RowLayout.from_inputs(inputs, self.sequence),
            inputs.input_ids,
            inputs.position_ids,
        )
        if self.sequence is None:
            states = self.hidden_states(ids, positions, layout)
            return states.flatten(0, 1).index_select(0, inputs.predictors), None
        indices, local_positions = self.sequence.local_indices(inputs.predictors, layout.num_positions)
        states = self.hidden_states(
            self.sequence.local_slice(ids), self.sequence.local_slice(positions), layout
        )
        return states[0].index_select(0, local_positions), indices

    def gather_tokens(self, values: Tensor, indices: Tensor | None, inputs: ModelInput) -> Tensor:
        """[M, ...] from values [m, ...] of the tokens on this rank, at the indices of `predictor_states`."""
        if indices is None or self.sequence is None:
            return values
        return self.sequence.gather_tokens(values, indices, len(inputs.targets))

    @abstractmethod
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        """A loss of 0 with a gradient of 0 for every weight, for a rank that has no rows."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of a layer in its backward pass, inside or outside `forward_mode`."""
        kwargs = {"use_reentrant": False, "context_fn": self._recompute_contexts}
        self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a layer in the forward pass and when it is computed again."""
        return nullcontext(), self._same_rows(current_layout())

    @contextmanager
    def _same_rows(self, layout: Layout | None) -> Iterator[None]:
        with use_attention(self.transformer), use_layout(layout):
            yield

    def family_states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Final states of the base model."""
        base = base_of(self.transformer)
        places = {"position_ids": position_ids} if self._takes_positions else {}
        states: Tensor = base(input_ids=input_ids, use_cache=False, **places).last_hidden_state
        return states

    @override
    def family_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.family_states(input_ids, position_ids)

    @override
    def outputs(self, states: Tensor) -> Tensor:
        return states.float()


def target_logprobs(vocab_logprobs: Tensor, targets: Tensor) -> Tensor:
    """[m], the logprobs of the ids [m] in vocabulary logprobs [m, V]."""
    return vocab_logprobs.gather(1, targets[:, None]).squeeze(1)


def entropies(vocab_logprobs: Tensor, *, with_grad: bool) -> Tensor:
    """[m], the entropies of vocabulary logprobs [m, V], in nats."""
    if with_grad and torch.is_grad_enabled():
        return -(vocab_logprobs.exp() * vocab_logprobs).sum(-1)
    with torch.no_grad():
        return -vocab_logprobs.exp().mul_(vocab_logprobs).sum(-1)


class PolicyModel(Backbone):
    """A causal language model as a policy: logits and logprobs of the response tokens.

    Attributes:
        num_ids: only ids below it have a probability; None: all rows of the head. Heads are often padded
            beyond the ids of the tokenizer.
    """

    compared = "logits"
    decodes = True
    num_ids: int | None = None

    def logits(self, states: Tensor) -> Tensor:
        """[M, V] fp32 from states [M, hidden], of the ids below `num_ids`."""
        logits = self.head_logits(states)
        return logits if self.num_ids is None else logits[..., : self.num_ids]

    def head_logits(self, states: Tensor) -> Tensor:
        """[M, rows of the head] fp32 from states [M, hidden]."""
        return family_logits(self.transformer, states)

    def reduce_vocab(
        self, inputs: ModelInput, reduce: Reduce, *columns: Tensor, temperature: float, chunk: int | None
    ) -> tuple[Tensor, ...]:
        """Apply `reduce` to the logprobs of the whole vocabulary at every response token.

        Only the logits of `chunk` tokens are in memory at a time. If there are more tokens, the backward pass
        computes the logits again.

        Args:
            inputs: rows with M response tokens.
            reduce: takes vocabulary logprobs [m, V], sampled ids [m] and the columns [m, ...] of a chunk.
            columns: [M, ...] for `reduce`.
            temperature: above 0; logits are divided by it.
            chunk: largest m; None: what suits the vocabulary and the device.

        Returns:
            Each result of `reduce` for all M tokens.
        """
        states, indices = self.predictor_states(inputs)
        columns = (inputs.targets, *columns)
        if indices is not None:
            columns = tuple(column[indices] for column in columns)
        tokens = (states, *columns)

        def of_chunk(states: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            logits = self.logits(states)
            # A quotient by 1 would be one more copy.
            return reduce(
                torch.log_softmax(logits if temperature == 1 else logits / temperature, -1), *others
            )

        vocabulary = self.transformer.config.get_text_config().vocab_size
        chunk = chunk or logits_chunk_tokens(vocabulary, self.device)
        if len(states) <= chunk:
            results = of_chunk(*tokens)
        else:
            chunks = zip(*(column.split(chunk) for column in tokens), strict=True)
            parts = [checkpoint(of_chunk, *part, use_reentrant=False) for part in chunks]
            results = tuple(torch.cat(result) for result in zip(*parts, strict=True))
        return tuple(self.gather_tokens(result, indices, inputs) for result in results)

    @override
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        return 0 * self.logits(self.predictor_states(inputs)[0]).sum()

    def token_logprobs(
        self, inputs: ModelInput, *, temperature: float, chunk: int | None, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logprobs of the response tokens and entropies of their distributions, both [M] fp32."""

        def of_sampled(vocab_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return target_logprobs(vocab_logprobs, targets), entropies(vocab_logprobs, with_grad=entropy_grad)

        logprobs, entropy = self.reduce_vocab(inputs, of_sampled, temperature=temperature, chunk=chunk)
        return logprobs, entropy

    @override
    def family_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        places = {"position_ids": position_ids} if self._takes_positions else {}
        logits: Tensor = self.transformer(input_ids=input_ids, use_cache=False, **places).logits
        return logits

    @override
    def outputs(self, states: Tensor) -> Tensor:
        return self.head_logits(states)


class ValueModel(Backbone):
    """A transformer with a scalar head: the value of the state before each response token."""

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__(transformer, precision)
        # Zero: the initial values are 0, whatever the scale of the states.
        self.head = nn.Linear(transformer.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def token_values(self, inputs: ModelInput) -> Tensor:
        """[M] fp32, one value per response token."""
        states, indices = self.predictor_states(inputs)
        return self.gather_tokens(self.head(states).squeeze(-1).float(), indices, inputs)

    @override
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        return 0 * self.token_values(inputs).sum()


class RewardModel(Backbone):
    """A Transformers model for sequence classification with one label: the score of an answer.

    The score is read at the last token of the answer. An answer must be followed by one more token of any
    kind, since the last token of a row is not read, see `ModelInput`.
    """

    @property
    def pad_id(self) -> int | None:
        """Padding id of the configuration; Transformers reads a score at the last token that is another."""
        pad_id: int | None = self.transformer.config.get_text_config().pad_token_id
        return pad_id

    def set_default_pad_id(self, pad_id: int | None) -> None:
        """Set the padding id where the configuration has none."""
        if self.pad_id is None:
            self.transformer.config.get_text_config().pad_token_id = pad_id

    def token_scores(self, inputs: ModelInput) -> Tensor:
        """[M] fp32, the score of each row up to the token before each response token."""
        states, indices = self.predictor_states(inputs)
        # In fp32: the difference of two scores of 5 would have two digits in bf16.
        with torch.autocast(states.device.type, enabled=False):
            scores = self.transformer.get_submodule("score")(states.float()).squeeze(-1)
        return self.gather_tokens(scores, indices, inputs)

    @override
    def zero_loss(self, inputs: ModelInput) -> Tensor:
        return 0 * self.token_scores(inputs).sum()
