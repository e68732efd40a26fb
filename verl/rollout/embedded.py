"""Generation on the trainer's own parameters: continuous batching over a slot cache, in plain PyTorch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.engines.attention import DecodeLayout, KVCache, RowLayout
from verl.engines.models import PolicyModel
from verl.rollout.sampling import RowParams, answer_seed, draw, uniforms
from verl.utils.rollout import Completion, FinishReason, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec

# Prompt tokens of one prefill: bounds the activations, not the number of prompts.
_PREFILL_TOKENS = 16_384


@dataclass(frozen=True)
class _Group:
    """Answers of one prompt that are started together, so that the prompt is computed once."""

    request: int
    first: int
    count: int


@dataclass
class _Row:
    """One answer that is being generated."""

    request: int
    sample: int
    params: SamplingParams
    tokens: list[int]
    logprobs: list[float]
    stop_ids: frozenset[int]


class EmbeddedEngine(RolloutEngine):
    """Answers prompts with the model that is being trained: same storage, no copy, no weight sync.

    Up to `max_slots` answers are generated at a time; where some end, waiting ones take their slots. A group larger than
    `max_slots` is started in parts, and its prompt computed once per part. What a row samples depends on its own
    seed alone (up to the rounding of differently shaped matrix products).
    """

    def __init__(self, model: PolicyModel, codec: TextCodec, *, max_slots: int = 256) -> None:
        self.model = model
        self.version = 0
        self._codec = codec
        self._max_slots = max_slots

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context.
            RuntimeError: the model's logits are not finite.
        """
        if len(prompts) != len(params):
            raise ValueError(f"need sampling parameters for each prompt, got {len(prompts)} prompts and {len(params)} parameters")
        context = self.model.transformer.config.get_text_config().max_position_embeddings
        for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            if not prompt or len(prompt) + wanted.max_tokens > context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and may get {wanted.max_tokens} more; need at least one, and at most "
                    f"{context} in all, the model's context; lower sampling.max_tokens or data.max_prompt_tokens"
                )
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.ready():
                return _Generation(self.model, self._codec, prompts, params, self._max_slots, self.version).run()
        finally:
            self.model.train(was_training)


class _Generation:
    """One call of `generate`: the queue of groups, the rows in the slots, and their state as tensors over the slots."""

    def __init__(
        self,
        model: PolicyModel,
        codec: TextCodec,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_slots: int,
        version: int,
    ) -> None:
        self.model, self.codec, self.version = model, codec, version
        self.prompts, self.params = prompts, params
        self.slots = min(max_slots, sum(p.n for p in params))
        self.queue = deque(
            _Group(i, first, min(self.slots, p.n - first)) for i, p in enumerate(params) for first in range(0, p.n, self.slots)
        )
        self.cache = KVCache(self.slots)
        self.rows: list[_Row] = []
        self.done: list[list[Completion | None]] = [[None] * p.n for p in params]
        self.tokens = torch.empty(0, dtype=torch.int64, device=model.device)  # last token of each row in use
        self.positions = self.tokens  # where it goes in its row
        self.seeds = self.tokens
        self.row_params = self._row_params()

    def run(self) -> list[list[Completion]]:
        """Generates everything."""
        while self.queue or self.rows:
            if self.queue and len(self.rows) + self.queue[0].count <= self.slots:
                self._admit()
            else:
                self._decode()
            self._retire()
        return [[c for c in completions if c is not None] for completions in self.done]

    def _admit(self) -> None:
        """Computes the prompts of the next groups, copies their cache to all siblings, draws the first tokens."""
        groups: list[_Group] = []
        room, budget = self.slots - len(self.rows), _PREFILL_TOKENS
        while self.queue and self.queue[0].count <= room and (budget > 0 or not groups):
            groups.append(self.queue.popleft())
            room -= groups[-1].count
            budget -= len(self.prompts[groups[-1].request])
        prompts = [self.prompts[g.request] for g in groups]
        lengths = [len(p) for p in prompts]
        self.cache.reserve(max(lengths) + 1)
        device = self.tokens.device
        counts = torch.tensor([g.count for g in groups], device=device)
        first_slots = len(self.rows) + counts.cumsum(0) - counts
        layout = RowLayout(lengths, True, device, self.cache, first_slots)
        ids = torch.tensor([[token for p in prompts for token in p]], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = self.model.logits(self.model.hidden(ids, positions, layout)[0, ends]).repeat_interleave(counts, 0)
        siblings = torch.arange(len(self.rows), len(self.rows) + len(logits), device=device)
        self.cache.copy(first_slots.repeat_interleave(counts), siblings, max(lengths))
        new = [self._row(g.request, g.first + i) for g in groups for i in range(g.count)]
        self.rows += new
        seeds = torch.tensor([answer_seed(r.params.seed, r.sample) for r in new], device=device)
        self.tokens = torch.cat([self.tokens, torch.zeros_like(siblings)])
        self.positions = torch.cat([self.positions, torch.tensor(lengths, device=device).repeat_interleave(counts) - 1])
        self.seeds = torch.cat([self.seeds, seeds])
        self.row_params = self._row_params()
        self._draw(logits, siblings)

    def _decode(self) -> None:
        """One more token for every row in use."""
        longest = int(self.positions.max()) + 1
        self.cache.reserve(longest)
        layout = DecodeLayout(self.cache, self.positions, longest)
        states = self.model.hidden(self.tokens[:, None], self.positions[:, None], layout)
        self._draw(self.model.logits(states[:, 0]), layout.rows)

    def _draw(self, logits: Tensor, slots: Tensor) -> None:
        """Draws the next token of the given last slots and notes it."""
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

    def _retire(self) -> None:
        """Takes ended rows out and moves the last ones into their slots, so that the first slots stay in use."""
        ended = [self._ended(row) for row in self.rows]
        if not any(ended):
            return
        for row, reason in zip(self.rows, ended, strict=True):
            if reason:
                self.done[row.request][row.sample] = Completion(row.tokens, row.logprobs, reason, self.version)
        kept = [i for i, reason in enumerate(ended) if not reason]
        holes = [i for i in range(len(kept)) if ended[i]]
        movers = [i for i in kept if i >= len(kept)]
        order = list(range(len(kept)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        index = torch.tensor(order, dtype=torch.int64, device=self.tokens.device)
        if holes:
            self.cache.copy(index[holes], torch.tensor(holes, device=index.device), int(self.positions[index].max()))
        self.rows = [self.rows[i] for i in order]
        self.tokens, self.positions, self.seeds = self.tokens[index], self.positions[index], self.seeds[index]
        self.row_params = self._row_params()

    def _ended(self, row: _Row) -> FinishReason | None:
        """The reason why a row ends here, or None."""
        if row.tokens[-1] in row.stop_ids or (row.params.stop and self._spells_stop(row)):
            return "stop"
        return "length" if len(row.tokens) == row.params.max_tokens else None

    def _spells_stop(self, row: _Row) -> bool:
        # A token spells at least a byte, so this many tokens hold the longest stop text, and some special tokens between.
        tail = self.codec.decode(row.tokens[-(max(len(stop.encode()) for stop in row.params.stop) + 8) :])
        return any(stop in tail for stop in row.params.stop)

    def _row(self, request: int, sample: int) -> _Row:
        params = self.params[request]
        return _Row(request, sample, params, [], [], frozenset((*self.codec.stop_ids, *params.stop_ids)))

    def _row_params(self, start: int = 0) -> RowParams:
        vocabulary = self.model.transformer.config.get_text_config().vocab_size
        return RowParams.of([r.params for r in self.rows[start:]], vocabulary=vocabulary, device=self.tokens.device)
