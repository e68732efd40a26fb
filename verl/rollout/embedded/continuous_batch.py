"""Continuous batching over a KV cache, in plain PyTorch: answers join and leave between two tokens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verl.engines.base import NotFiniteError, not_finite_advice
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.row_layouts import CachedRow, DecodeLayout, ExtendLayout, KVCache, RowLayout
from verl.rollout.embedded.prefix_cache import NO_PREFIX, PrefixCache, PrefixMatch
from verl.rollout.embedded.sampling import (
    RowSampling,
    answer_seed,
    penalized,
    sample_tokens,
    sampling_logits,
    uniforms,
)
from verl.utils.sampling_types import FinishReason, SamplingParams
from verl.utils.tokens import TextCodec

# Prompt tokens of one prefill: bounds the activations, not the number of prompts.
_PREFILL_TOKENS = 16_384
# Pairs of a new token and one before it in a prefill behind cached prefixes: bounds the masks.
_PREFILL_PAIRS = 1 << 24


@dataclass(frozen=True)
class WaitingGroup:
    """Answers to one prompt that wait for slots and start together, so that the prompt is computed once.

    Attributes:
        prompt_id: chosen by the caller.
        prompt: token ids.
        params: how the answers are sampled.
        num_top_logprobs: most likely tokens to report with each token.
        first: sample index of the first answer.
        count: answers, with consecutive sample indices.
    """

    prompt_id: int
    prompt: Sequence[int]
    params: SamplingParams
    num_top_logprobs: int
    first: int
    count: int

    def without(self, sample_indices: Collection[int] | None) -> list[WaitingGroup]:
        """Groups of the answers that remain when some are aborted; None: all are."""
        if sample_indices is None:
            return []
        own = range(self.first, self.first + self.count)
        return [replace(self, first=i, count=1) for i in own if i not in sample_indices]


@dataclass
class Row:
    """An answer in generation.

    Attributes:
        prompt_id: of its prompt, chosen by the caller.
        sample_index: among the answers to its prompt.
        prompt: token ids.
        params: how it is sampled.
        stop_ids: ids that end it.
        num_top_logprobs: most likely tokens to report with each token.
        tokens: sampled so far.
        logprobs: of these.
        top_logprobs: id and logprob of the most likely tokens at the position of the last token, the best
            first.
        finish_reason: None while it goes on.
        num_reused: prompt tokens whose keys and values were there already.
        is_stale: weights have changed since some of its keys and values were computed.
    """

    prompt_id: int
    sample_index: int
    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    num_top_logprobs: int = 0
    num_reused: int = 0
    is_stale: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token: int, logprob: float, codec: TextCodec) -> None:
        """Append a sampled token, and finish if it ends the answer."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        stop = self.params.stop
        # A token spells at least one byte, so these tokens hold the longest stop text and some special
        # tokens.
        window = max((len(text.encode()) for text in stop), default=0) + 8
        tail = codec.decode(self.tokens[-window:]) if stop and token not in self.stop_ids else ""
        if token in self.stop_ids or any(text in tail for text in stop):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"


class SlotCache(KVCache):
    """A KV cache whose number of slots grows."""

    @property
    def is_empty(self) -> bool:
        """True if it has no memory yet."""
        return not self._layers and not self._states

    def widen(self, num_slots: int) -> None:
        """Make room for more rows."""
        self.num_slots = num_slots
        for layer, pair in self._layers.items():
            keys, values = (
                torch.cat([old, old.new_zeros(num_slots - len(old), *old.shape[1:])]) for old in pair
            )
            self._layers[layer] = (keys, values)
        for key, old in self._states.items():
            self._states[key] = torch.cat([old, old.new_zeros(num_slots - len(old), *old.shape[1:])])


class ContinuousBatch:
    """Answers that are generated together, one token per step.

    Answers may be added and aborted between any two steps. `step` and `recompute_cache` need
    `model.forward_mode()` around them.

    Args:
        model: the policy, in evaluation mode.
        codec: its tokenizer.
        slots: answers at a time.
        first_slots: slots of the cache at first; their number is doubled when needed.
        prefixes: rows that finished, from which prompts that begin with them continue; None: each prompt is
            computed from its beginning. Logprobs differ by rounding: a token is computed alone or beside
            others. Families with a recurrent state use none, since their state is that after a whole row.

    Attributes:
        queue: groups that wait for slots.
        cache: of the rows.
        rows: answers in the slots 0, 1, ...
        tokens: [A] int64, the last token of each row.
        positions: [A] int64, position of this token in its row.
        seeds: [A] int64, see `answer_seed`.
    """

    def __init__(
        self,
        model: PolicyModel,
        codec: TextCodec,
        *,
        slots: int,
        first_slots: int,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.model, self.codec, self._prefixes = model, codec, prefixes
        self.slots, self.first_slots = slots, min(slots, first_slots)
        self.queue: deque[WaitingGroup] = deque()
        self.cache = SlotCache(self.first_slots)
        self.rows: list[Row] = []
        self.tokens = torch.empty(0, dtype=torch.int64, device=model.device)
        self.positions = self.tokens
        self.seeds = self.tokens
        self._sampling = sampling_of(self.rows, self.model, self.tokens.device)

    @property
    def is_idle(self) -> bool:
        """True if nothing is left to generate."""
        return not self.queue and not self.rows

    def add(
        self,
        prompt_id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        num_top_logprobs: int = 0,
        first_sample_index: int = 0,
    ) -> None:
        """Queue `params.n` answers to a prompt, which fits the model's context with `params.max_tokens` more.

        Args:
            prompt_id: chosen by the caller, not in use.
            prompt: token ids.
            params: how to sample.
            num_top_logprobs: most likely tokens to report with each token.
            first_sample_index: of the answers.
        """
        for first in range(0, params.n, self.slots):
            count = min(self.slots, params.n - first)
            self.queue.append(
                WaitingGroup(prompt_id, prompt, params, num_top_logprobs, first_sample_index + first, count)
            )

    def free_cache(self) -> None:
        """Free the memory of many or long answers, if nothing is left to generate."""
        if self.is_idle and not self.cache.is_empty:
            self.cache = SlotCache(self.first_slots)

    @torch.inference_mode()
    def abort(self, prompt_id: int, sample_indices: Collection[int] | None = None) -> None:
        """Abort the answers to a prompt, or only some of them."""
        left: deque[WaitingGroup] = deque()
        for group in self.queue:
            left.extend(group.without(sample_indices) if group.prompt_id == prompt_id else [group])
        self.queue = left
        for row in self.rows:
            if row.prompt_id == prompt_id and (sample_indices is None or row.sample_index in sample_indices):
                row.finish_reason = "abort"
        self._remove_finished()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Sample one token for some rows, and return these rows.

        Waiting answers get their first token if a group fits; otherwise each row gets its next one.
        """
        fits = bool(self.queue) and len(self.rows) + self.queue[0].count <= self.slots
        sampled = self._start_groups() if fits else self._decode()
        self._remove_finished()
        return sampled

    def finished_rows(self) -> Iterator[Row]:
        """Step until nothing is left, and yield each row that finishes."""
        while not self.is_idle:
            yield from (row for row in self.step() if row.finish_reason is not None)

    @torch.inference_mode()
    def recompute_cache(self) -> None:
        """Compute the cache of all rows with the present weights; the sampled tokens stay."""
        lines = [[*row.prompt, *row.tokens[:-1]] for row in self.rows]
        for part in portions([len(line) for line in lines], _PREFILL_TOKENS):
            slots = torch.arange(part.start, part.stop, device=self.tokens.device)
            self._prefill(lines[part.start : part.stop], slots)

    def mark_stale(self) -> None:
        """Note that running rows go on after a change of the weights without `recompute_cache`."""
        for row in self.rows:
            row.is_stale = True

    def _start_groups(self) -> list[Row]:
        """Compute the next prompts, copy their cache to all answers, and sample the first tokens."""
        groups: list[WaitingGroup] = []
        known: list[PrefixMatch[CachedRow]] = []
        room, budget = self.slots - len(self.rows), _PREFILL_TOKENS
        while self.queue and self.queue[0].count <= room and (budget > 0 or not groups):
            groups.append(self.queue.popleft())
            known.append(NO_PREFIX if self._prefixes is None else self._prefixes.prefix_of(groups[-1].prompt))
            room -= groups[-1].count
            budget -= len(groups[-1].prompt) - known[-1].length
        if (needed := self.slots - room) > self.cache.num_slots:
            self.cache.widen(min(self.slots, max(needed, 2 * self.cache.num_slots)))
        lengths = [len(group.prompt) for group in groups]
        device = self.tokens.device
        counts = torch.tensor([group.count for group in groups], device=device)
        # Each prompt is computed in the slot of its first answer.
        first_slots = len(self.rows) + counts.cumsum(0) - counts
        states = self._prompt_states([group.prompt for group in groups], known, first_slots)
        logits = self.model.logits(states).repeat_interleave(counts, 0)
        slots = torch.arange(len(self.rows), len(self.rows) + len(logits), device=device)
        self.cache.copy(first_slots.repeat_interleave(counts), slots, max(lengths))
        self._append_rows(groups, counts, known)
        return self._sample(logits, len(slots))

    def _prompt_states(
        self, prompts: Sequence[Sequence[int]], known: Sequence[PrefixMatch[CachedRow]], slots: Tensor
    ) -> Tensor:
        """Last hidden state [P, hidden] of each prompt, whose slots of the cache are filled."""
        behind = [i for i, prefix in enumerate(known) if prefix.length]
        if not behind:
            return self._whole_states(prompts, slots)
        whole = [i for i, prefix in enumerate(known) if not prefix.length]
        states: dict[int, Tensor] = {}
        if whole:
            found = self._whole_states([prompts[i] for i in whole], slots[whole])
            states |= dict(zip(whole, found, strict=True))
        pairs = [(len(prompts[i]) - known[i].length) * len(prompts[i]) for i in behind]
        for part in portions(pairs, _PREFILL_PAIRS):
            own = [behind[i] for i in part]
            found = self._extend([prompts[i] for i in own], [known[i] for i in own], slots[own].tolist())
            states |= dict(zip(own, found, strict=True))
        return torch.stack([states[i] for i in range(len(prompts))])

    def _whole_states(self, prompts: Sequence[Sequence[int]], slots: Tensor) -> Tensor:
        """Last hidden state [P, hidden] of prompts that are computed from their beginning."""
        states = self._prefill(prompts, slots)
        if self._prefixes is not None:  # for siblings that come later
            for prompt, slot in zip(prompts, slots.tolist(), strict=True):
                self._keep(prompt, slot)
        return states[0, torch.tensor([len(prompt) for prompt in prompts], device=slots.device).cumsum(0) - 1]

    def _keep(self, tokens: Sequence[int], slot: int) -> None:
        if self._prefixes is not None and not self.cache.is_recurrent and not self._prefixes.has(tokens):
            row = self.cache.row(slot, len(tokens))
            self._prefixes.keep(tokens, row, max_tokens=self.slots * self.cache.length)

    def _extend(
        self, prompts: Sequence[Sequence[int]], known: Sequence[PrefixMatch[CachedRow]], slots: list[int]
    ) -> Tensor:
        """Last hidden state [P, hidden] of prompts; only what is behind a known prefix is computed."""
        self.cache.reserve(max(map(len, prompts)) + 1)
        for slot, prefix in zip(slots, known, strict=True):
            self.cache.put_row(slot, prefix.value, prefix.length)
        starts = [prefix.length for prefix in known]
        new = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        device = self.tokens.device
        layout = ExtendLayout(self.cache, slots, starts, [len(line) for line in new], device)
        ids = torch.tensor([[token for line in new for token in line]], device=device)
        states = self.model.hidden_states(ids, layout.positions[None], layout)
        return states[0, torch.tensor(layout.lengths, device=device).cumsum(0) - 1]

    def _append_rows(
        self, groups: Sequence[WaitingGroup], counts: Tensor, known: Sequence[PrefixMatch[CachedRow]]
    ) -> None:
        """Add a row for each answer, at the position of the last token of its prompt."""
        new = [
            Row(
                group.prompt_id,
                group.first + i,
                group.prompt,
                group.params,
                frozenset((*self.codec.stop_ids, *group.params.stop_ids)),
                group.num_top_logprobs,
                num_reused=len(group.prompt) if i else prefix.length,
            )
            for group, prefix in zip(groups, known, strict=True)
            for i in range(group.count)
        ]
        device = self.tokens.device
        self.rows += new
        seeds = torch.tensor([answer_seed(row.params.seed, row.sample_index) for row in new], device=device)
        lengths = torch.tensor([len(group.prompt) for group in groups], device=device)
        self.tokens = torch.cat([self.tokens, torch.zeros_like(seeds)])
        self.positions = torch.cat([self.positions, lengths.repeat_interleave(counts) - 1])
        self.seeds = torch.cat([self.seeds, seeds])
        self._sampling = sampling_of(self.rows, self.model, self.tokens.device)

    def _prefill(self, lines: Sequence[Sequence[int]], slots: Tensor) -> Tensor:
        """Fill slots of the cache, one per line of token ids; last hidden states [1, all tokens, hidden]."""
        device = self.tokens.device
        lengths = [len(line) for line in lines]
        self.cache.reserve(max(lengths) + 1)
        layout = RowLayout(lengths, True, device, self.cache, slots)
        ids = torch.tensor([[token for line in lines for token in line]], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        return self.model.hidden_states(ids, positions, layout)

    def _decode(self) -> list[Row]:
        """Sample one more token for every row."""
        longest = int(self.positions.max()) + 1
        self.cache.reserve(longest)
        layout = DecodeLayout(self.cache, self.positions, longest)
        states = self.model.hidden_states(self.tokens[:, None], self.positions[:, None], layout)
        return self._sample(self.model.logits(states[:, 0]), len(self.rows))

    def _sample(self, logits: Tensor, count: int) -> list[Row]:
        """Sample the next token of the last `count` rows from logits [count, V], and return these rows."""
        start = len(self.rows) - count
        rows = self.rows[start:]
        params = self._sampling if start == 0 else sampling_of(rows, self.model, self.tokens.device)
        penalties = [row.params.repetition_penalty for row in rows]
        logits = penalized(logits, penalties, [[*row.prompt, *row.tokens] for row in rows])
        tokens, logprobs = sample_tokens(logits, params, uniforms(self.seeds[start:], self.positions[start:]))
        self.tokens[start:] = tokens
        self.positions[start:] += 1
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if math.isnan(logprob):
                precision = self.model.precision
                raise NotFiniteError(
                    f"the model's logits are not finite at token {len(row.tokens)} of an answer to prompt "
                    f"{row.prompt_id}; it computes in {precision}: {not_finite_advice(precision)}"
                )
            row.add(token, logprob, self.codec)
        num_top = max(row.num_top_logprobs for row in rows)
        if num_top:
            self._record_top_logprobs(rows, sampling_logits(logits, params).log_softmax(-1), num_top)
        return rows

    def _record_top_logprobs(self, rows: Sequence[Row], logprobs: Tensor, count: int) -> None:
        top, tokens = logprobs.topk(min(count, logprobs.shape[1]))
        for row, own_tokens, own_logprobs in zip(rows, tokens.tolist(), top.tolist(), strict=True):
            pairs = list(zip(own_tokens, own_logprobs, strict=True))[: row.num_top_logprobs]
            # Tokens that the truncation dropped have logprob -inf.
            row.top_logprobs = [(token, logprob) for token, logprob in pairs if math.isfinite(logprob)]

    def _remove_finished(self) -> None:
        """Remove finished rows, and move the last rows into their slots: the first slots are in use."""
        is_finished = [row.finish_reason is not None for row in self.rows]
        if not any(is_finished):
            return
        for slot, row in enumerate(self.rows):
            # The last token of a row was never read.
            if row.finish_reason in ("stop", "length") and not row.is_stale:
                self._keep([*row.prompt, *row.tokens[:-1]], slot)
        kept = [i for i, finished in enumerate(is_finished) if not finished]
        holes = [i for i in range(len(kept)) if is_finished[i]]
        movers = [i for i in kept if i >= len(kept)]
        order = list(range(len(kept)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        index = torch.tensor(order, dtype=torch.int64, device=self.tokens.device)
        if holes:
            longest = int(self.positions[index].max())
            self.cache.copy(index[holes], torch.tensor(holes, device=index.device), longest)
        self.rows = [self.rows[i] for i in order]
        self.tokens, self.positions, self.seeds = self.tokens[index], self.positions[index], self.seeds[index]
        self._sampling = sampling_of(self.rows, self.model, self.tokens.device)


def sampling_of(rows: Sequence[Row], model: PolicyModel, device: torch.device) -> RowSampling:
    """Sampling parameters of rows as tensors."""
    vocabulary = model.transformer.config.get_text_config().vocab_size
    return RowSampling.of([row.params for row in rows], vocabulary=vocabulary, device=device)


def portions(costs: Sequence[int], budget: int) -> Iterator[range]:
    """Consecutive ranges of entries whose costs fit a budget; an entry above it is a range of its own."""
    start = 0
    while start < len(costs):
        stop, left = start, budget
        while stop < len(costs) and (stop == start or costs[stop] <= left):
            left -= costs[stop]
            stop += 1
        yield range(start, stop)
        start = stop
