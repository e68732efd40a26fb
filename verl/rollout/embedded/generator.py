"""Generation on the trainer's own parameters: continuous batching over a slot cache, in plain PyTorch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verl.engines.hf.attention import DecodeLayout, KVCache, RowLayout
from verl.engines.hf.models import PolicyModel
from verl.rollout.embedded.sampling import RowSampling, answer_seed, draw, truncated, uniforms
from verl.utils.sampling_types import BatchGenerator, Completion, FinishReason, SamplingParams, check_requests
from verl.utils.tokens import TextCodec

# Prompt tokens of one prefill: bounds the activations, not the number of prompts.
_PREFILL_TOKENS = 16_384


@dataclass(frozen=True)
class _Group:
    """Answers of one prompt that are started together, so that the prompt is computed once."""

    request: int
    prompt: Sequence[int]
    params: SamplingParams
    num_likeliest: int
    first: int
    count: int


@dataclass
class Row:
    """One answer that is being generated.

    Attributes:
        request: number of what asked for it.
        sample: its number among the answers to its prompt.
        prompt: token ids.
        params: how it is sampled.
        stop_ids: ids that end it.
        num_likeliest: how many of the most likely tokens are noted with each token.
        tokens: sampled so far.
        logprobs: of these.
        likeliest: of the place of the last token, id and logprob of the most likely ones, the best first.
        finish_reason: None while it goes on.
    """

    request: int
    sample: int
    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    num_likeliest: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class EmbeddedEngine(BatchGenerator):
    """Answers prompts with the model that is being trained: same storage, no copy, no weight sync.

    Up to `max_slots` answers are generated at a time; where some end, waiting ones take their slots. A group
    larger than `max_slots` is started in parts, and its prompt computed once per part. What a row samples
    depends on its own seed alone (up to the rounding of differently shaped matrix products).
    """

    def __init__(self, model: PolicyModel, codec: TextCodec, *, max_slots: int = 256) -> None:
        self.model = model
        self.version = 0
        self._codec = codec
        self._max_slots = max_slots

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See `BatchGenerator.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context.
            RuntimeError: the model's logits are not finite.
        """
        context = self.model.transformer.config.get_text_config().max_position_embeddings
        check_requests(prompts, params, context=context)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.forward_mode():
                return self._answers(prompts, params)
        finally:
            self.model.train(was_training)

    def _answers(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        slots = min(self._max_slots, sum(p.n for p in params))
        generation = Generation(self.model, self._codec, slots=slots, first_slots=slots)
        for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            generation.add(i, prompt, wanted, first_answer=wanted.sample_index)
        done: list[list[Completion | None]] = [[None] * p.n for p in params]
        while not generation.is_idle:
            for row in generation.step():
                if row.finish_reason:
                    done[row.request][row.sample - params[row.request].sample_index] = Completion(
                        row.tokens, row.logprobs, row.finish_reason, self.version
                    )
        return [[c for c in completions if c is not None] for completions in done]


class _SlotCache(KVCache):
    """A cache whose number of slots grows as well."""

    @property
    def is_empty(self) -> bool:
        """Whether it takes no memory."""
        return not self._layers

    def widen(self, num_slots: int) -> None:
        """Makes room for more rows."""
        self.num_slots = num_slots
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (self._widened(keys), self._widened(values))

    def _widened(self, old: Tensor) -> Tensor:
        return torch.cat([old, old.new_zeros(self.num_slots - len(old), *old.shape[1:])])


class Generation:
    """Answers that are generated together, one token at a time: the queue of groups, the rows in the slots,
    their state over the slots.

    Answers may be asked for and taken back between any two steps. Needs `model.forward_mode()` around `step` and
    `recompute`.

    Args:
        model: the policy, in evaluation mode.
        codec: its tokenizer.
        slots: most answers at a time.
        first_slots: as many slots the cache has at first; it doubles them as they are needed.
    """

    def __init__(self, model: PolicyModel, codec: TextCodec, *, slots: int, first_slots: int) -> None:
        self.model, self.codec = model, codec
        self.slots, self.first_slots = slots, min(slots, first_slots)
        self.queue: deque[_Group] = deque()
        self.cache = _SlotCache(self.first_slots)
        self.rows: list[Row] = []
        self.tokens = torch.empty(0, dtype=torch.int64, device=model.device)  # last token of each row in use
        self.positions = self.tokens  # where it goes in its row
        self.seeds = self.tokens
        self.row_params = self._row_params()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be generated."""
        return not self.queue and not self.rows

    def add(
        self,
        request: int,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        num_likeliest: int = 0,
        first_answer: int = 0,
    ) -> None:
        """Asks for `params.n` answers to a prompt, from a number on; with `params.max_tokens` more it fits
        the model's context.
        """
        for first in range(0, params.n, self.slots):
            count = min(self.slots, params.n - first)
            self.queue.append(_Group(request, prompt, params, num_likeliest, first_answer + first, count))

    def free(self) -> None:
        """Gives back what many or long answers took, once nothing is left to be generated."""
        if self.is_idle and not self.cache.is_empty:
            self.cache = _SlotCache(self.first_slots)

    @torch.inference_mode()
    def abort(self, request: int, samples: Collection[int] | None = None) -> None:
        """Takes a request back, or some of the answers to its prompt: they end where they are."""
        self.queue = deque(left for group in self.queue for left in _without(group, request, samples))
        for row in self.rows:
            if row.request == request and (samples is None or row.sample in samples):
                row.finish_reason = "abort"
        self._retire()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One more token for some rows, and these rows: the first one of waiting answers where there is room,
        else one for each.
        """
        fits = bool(self.queue) and len(self.rows) + self.queue[0].count <= self.slots
        drawn = self._admit() if fits else self._decode()
        self._retire()
        return drawn

    @torch.inference_mode()
    def recompute(self) -> None:
        """Fills the cache anew for the rows in use, as their weights have changed; what was sampled stays."""
        device, start = self.tokens.device, 0
        lines = [[*row.prompt, *row.tokens[:-1]] for row in self.rows]
        while start < len(lines):
            stop, budget = start, _PREFILL_TOKENS
            while stop < len(lines) and (stop == start or len(lines[stop]) <= budget):
                budget -= len(lines[stop])
                stop += 1
            self._prefill(lines[start:stop], torch.arange(start, stop, device=device))
            start = stop

    def _admit(self) -> list[Row]:
        """Computes the prompts of the next groups, copies their cache to all siblings, draws the first
        tokens.
        """
        groups: list[_Group] = []
        room, budget = self.slots - len(self.rows), _PREFILL_TOKENS
        while self.queue and self.queue[0].count <= room and (budget > 0 or not groups):
            groups.append(self.queue.popleft())
            room -= groups[-1].count
            budget -= len(groups[-1].prompt)
        if (needed := self.slots - room) > self.cache.num_slots:
            self.cache.widen(min(self.slots, max(needed, 2 * self.cache.num_slots)))
        lengths = [len(g.prompt) for g in groups]
        device = self.tokens.device
        counts = torch.tensor([g.count for g in groups], device=device)
        first_slots = len(self.rows) + counts.cumsum(0) - counts
        states = self._prefill([g.prompt for g in groups], first_slots)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = self.model.logits(states[0, ends]).repeat_interleave(counts, 0)
        siblings = torch.arange(len(self.rows), len(self.rows) + len(logits), device=device)
        self.cache.copy(first_slots.repeat_interleave(counts), siblings, max(lengths))
        new = [self._row(g, g.first + i) for g in groups for i in range(g.count)]
        self.rows += new
        seeds = torch.tensor([answer_seed(r.params.seed, r.sample) for r in new], device=device)
        self.tokens = torch.cat([self.tokens, torch.zeros_like(siblings)])
        self.positions = torch.cat(
            [self.positions, torch.tensor(lengths, device=device).repeat_interleave(counts) - 1]
        )
        self.seeds = torch.cat([self.seeds, seeds])
        self.row_params = self._row_params()
        return self._draw(logits, siblings)

    def _prefill(self, lines: Sequence[Sequence[int]], slots: Tensor) -> Tensor:
        """Fills the given slots, one per line of token ids; final hidden states [1, tokens of all lines,
        hidden].
        """
        device = self.tokens.device
        lengths = [len(line) for line in lines]
        self.cache.reserve(max(lengths) + 1)
        layout = RowLayout(lengths, True, device, self.cache, slots)
        ids = torch.tensor([[token for line in lines for token in line]], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        return self.model.hidden_states(ids, positions, layout)

    def _decode(self) -> list[Row]:
        """One more token for every row in use."""
        longest = int(self.positions.max()) + 1
        self.cache.reserve(longest)
        layout = DecodeLayout(self.cache, self.positions, longest)
        states = self.model.hidden_states(self.tokens[:, None], self.positions[:, None], layout)
        return self._draw(self.model.logits(states[:, 0]), layout.rows)

    def _draw(self, logits: Tensor, slots: Tensor) -> list[Row]:
        """Draws the next token of the given last slots and notes it; returns their rows."""
        start = len(self.rows) - len(slots)
        params = self.row_params if start == 0 else self._row_params(start)
        tokens, logprobs = draw(logits, params, uniforms(self.seeds[start:], self.positions[start:]))
        self.tokens[start:] = tokens
        self.positions[start:] += 1
        for row, token, logprob in zip(self.rows[start:], tokens.tolist(), logprobs.tolist(), strict=True):
            if math.isnan(logprob):
                raise RuntimeError(
                    f"the model's logits are not finite at token {len(row.tokens)} of an answer to prompt {row.request}; "
                    f"it computes in {self.model.precision}: use policy.precision=bf16 or fp32, and look at the last updates"
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.finish_reason = self._end(row)
        self._note_likeliest(self.rows[start:], logits, params)
        return self.rows[start:]

    def _note_likeliest(self, rows: Sequence[Row], logits: Tensor, params: RowSampling) -> None:
        """Notes the most likely tokens, by the distribution that was drawn from, for the rows that want them."""
        if not (count := max(row.num_likeliest for row in rows)):
            return
        scaled = logits / params.temperature[:, None]
        if not params.plain:
            scaled = torch.where(params.greedy[:, None], scaled, truncated(scaled, params))
        logprobs, tokens = torch.log_softmax(scaled, -1).topk(min(count, scaled.shape[1]))
        for row, own_tokens, own_logprobs in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            pairs = list(zip(own_tokens, own_logprobs, strict=True))[: row.num_likeliest]
            row.likeliest = [(token, logprob) for token, logprob in pairs if math.isfinite(logprob)]

    def _retire(self) -> None:
        """Takes ended rows out and moves the last ones into their slots, so that the first slots stay in use."""
        ended = [row.finish_reason is not None for row in self.rows]
        if not any(ended):
            return
        kept = [i for i, is_over in enumerate(ended) if not is_over]
        holes = [i for i in range(len(kept)) if ended[i]]
        movers = [i for i in kept if i >= len(kept)]
        order = list(range(len(kept)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        index = torch.tensor(order, dtype=torch.int64, device=self.tokens.device)
        if holes:
            self.cache.copy(
                index[holes], torch.tensor(holes, device=index.device), int(self.positions[index].max())
            )
        self.rows = [self.rows[i] for i in order]
        self.tokens, self.positions, self.seeds = self.tokens[index], self.positions[index], self.seeds[index]
        self.row_params = self._row_params()

    def _end(self, row: Row) -> FinishReason | None:
        """The reason why a row ends here, or None."""
        if row.tokens[-1] in row.stop_ids or (row.params.stop and self._spells_stop(row)):
            return "stop"
        return "length" if len(row.tokens) == row.params.max_tokens else None

    def _spells_stop(self, row: Row) -> bool:
        # A token spells at least a byte, so this many tokens hold the longest stop text, and some special
        # tokens between.
        tail = self.codec.decode(row.tokens[-(max(len(stop.encode()) for stop in row.params.stop) + 8) :])
        return any(stop in tail for stop in row.params.stop)

    def _row(self, group: _Group, sample: int) -> Row:
        stop_ids = frozenset((*self.codec.stop_ids, *group.params.stop_ids))
        return Row(group.request, sample, group.prompt, group.params, stop_ids, group.num_likeliest)

    def _row_params(self, start: int = 0) -> RowSampling:
        vocabulary = self.model.transformer.config.get_text_config().vocab_size
        return RowSampling.of(
            [r.params for r in self.rows[start:]], vocabulary=vocabulary, device=self.tokens.device
        )


def _without(group: _Group, request: int, samples: Collection[int] | None) -> list[_Group]:
    """What is left of answers that wait: as they are, or each by itself."""
    if group.request != request:
        return [group]
    numbers = range(group.first, group.first + group.count)
    return (
        []
        if samples is None
        else [replace(group, first=number, count=1) for number in numbers if number not in samples]
    )
