"""Hugging Face transformers as policies, value models and reward models that read rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from typing_extensions import override

from verl.data.batch import ModelInput
from verl.engines.hf.attention import DecodeLayout, RowLayout, use_attention
from verl.engines.hf.lora import adapter_of, policy_name, use_adapter
from verl.engines.memory_limits import logits_chunk_tokens
from verl.engines.sequence_parallel import SequenceGroup
from verl.utils.device import autocast

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")
# In shapes: M response tokens, m of them on this rank or in a chunk, V vocabulary.
# Tensors from the vocabulary logprobs [m, V], the sampled ids [m] and more columns [m, ...].
Reduce = Callable[..., tuple[Tensor, ...]]


class Backbone(nn.Module):
    """A causal transformer with one forward pass for training, prefill and decoding.

    Attributes:
        transformer: the Hugging Face model. Its weights are fp32 and shared by all users of this object.
        precision: arithmetic of the forward pass.
        adapter: the LoRA adapter of the transformer that this model computes with, "": none of them; None: it
            has none.
        sequence: the ranks that share the packed sequence in training; None: it is whole on this rank.
        compute_device: device of the computation, if the weights are stored on another one.
    """

    # Outputs that `check_forward` compares, for its message.
    _compared = "states"
    sequence: SequenceGroup | None = None
    compute_device: torch.device | None = None
    adapter: str | None = None

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__()
        self.transformer = transformer
        self.precision: Precision = precision
        # With dropout the sampler and the trainer would be two different policies.
        for module in transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
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

    def forward(self, call: Callable[[], T]) -> T:
        """The result of `call`; every use of the weights goes through here, so that FSDP's hooks run."""
        return call()

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

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, layout: RowLayout | DecodeLayout
    ) -> Tensor:
        """Final hidden states, [..., hidden], of ids and positions [...]; needs `forward_mode`."""
        base = self.transformer.base_model
        return base(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout
        ).last_hidden_state

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

    def zero_loss(self, inputs: ModelInput) -> Tensor:
        """A loss of 0 with a gradient of 0 for every weight, for a rank that has no rows."""
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of a layer in its backward pass, inside or outside `forward_mode`."""
        kwargs = {
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), use_attention(self.transformer)),
        }
        self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    @torch.no_grad()
    def check_forward(self) -> None:
        """Compare this forward pass with the family's own on a few tokens, and the sliding windows.

        Raises:
            ValueError: they differ: the family does something that this forward pass does not support.
        """
        vocabulary = self.transformer.config.get_text_config().vocab_size
        ids = torch.arange(4, 12, device=self.device)[None] % vocabulary
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        # Eager attention is the family's definition; PyTorch's leaves out Gemma 2's cap.
        with use_attention(self.transformer, "eager"):
            expected = self._family_outputs(ids, positions)[0].float()
        layout = RowLayout([ids.shape[1]] * 2, True, self.device)
        try:
            with use_attention(self.transformer):
                packed = torch.cat([ids, ids], 1), torch.cat([positions, positions], 1)
                states = self.hidden_states(*packed, layout)[0]
                outputs = self._outputs(states)
        except (AttributeError, TypeError, ValueError) as error:
            # The code of the family does not accept this kind of call.
            raise self._unsupported(f"{type(error).__name__}: {error}") from error
        difference = max(float((part - expected).abs().max()) for part in outputs.split(ids.shape[1]))
        # Weights that are sharded for 16 bits compute in 16 bits here, too, and round accordingly.
        tolerance = 1e-3 if states.dtype == torch.float32 else 3e-2
        if not difference <= tolerance * max(1.0, float(expected.abs().max())):
            raise self._unsupported(
                f"its {self._compared} differ by {difference:.2g} from its own forward pass"
            )
        # The few tokens above are shorter than most windows, so windows are compared by themselves.
        if missing := [layer for layer in self._windowed_layers() if layout.windows.get(layer) is None]:
            raise self._unsupported(f"the attention of layer {missing[0]} is not told its window")

    def _windowed_layers(self) -> list[int]:
        """Layers that do not attend to the whole row, by the configuration."""
        config = self.transformer.config.get_text_config().to_dict()
        if config.get("layer_types"):
            return [layer for layer, kind in enumerate(config["layer_types"]) if kind != "full_attention"]
        short = 0 < (config.get("sliding_window") or 0) < config["max_position_embeddings"]
        return list(range(config["num_hidden_layers"])) if short else []

    def _family_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Outputs of the family's own forward pass, to be compared with `_outputs`."""
        return self.transformer.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def _outputs(self, states: Tensor) -> Tensor:
        return states.float()

    def _unsupported(self, reason: str) -> ValueError:
        return ValueError(
            f"model family {self.transformer.config.model_type!r} cannot be run by rows: {reason}; use a "
            "family that attends through the Transformers attention interface, such as Qwen2, Qwen3, Llama, "
            "Mistral or Gemma"
        )


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

    _compared = "logits"
    num_ids: int | None = None

    def __init__(self, transformer: PreTrainedModel, precision: Precision) -> None:
        super().__init__(transformer, precision)
        self._softcap: float | None = transformer.config.to_dict().get("final_logit_softcapping")

    def logits(self, states: Tensor) -> Tensor:
        """[M, V] fp32 from states [M, hidden], of the ids below `num_ids`."""
        logits = self.head_logits(states)
        return logits if self.num_ids is None else logits[..., : self.num_ids]

    def head_logits(self, states: Tensor) -> Tensor:
        """[M, rows of the head] fp32 from states [M, hidden]."""
        logits = self.transformer.get_output_embeddings()(states).float()
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

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
    def _family_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.transformer(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    @override
    def _outputs(self, states: Tensor) -> Tensor:
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
