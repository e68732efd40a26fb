"""Rollout workers of users, texts in and texts out, as batch generators."""

from __future__ import annotations

import asyncio
import inspect
import reprlib
from collections.abc import Sequence

from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import BatchGenerator, Completion, SamplingParams
from verl.utils.tokens import TextCodec


class TextWorkerGenerator(BatchGenerator):
    """Generation by a `BaseRolloutWorker`: its texts are tokenized once, and have no logprobs.

    The worker gets each prompt `n` times as the model would read it (chat template applied), and the largest
    `max_tokens`. It chooses temperature and other sampling parameters itself.
    """

    def __init__(self, worker: BaseRolloutWorker, codec: TextCodec) -> None:
        self._worker = worker
        self._codec = codec

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """Answer every prompt, as `BatchGenerator.generate`.

        Raises:
            ValueError: the worker returned something else than a list with one text per prompt.
        """
        asked = [
            self._codec.decode_prompt(list(p))
            for p, wanted in zip(prompts, params, strict=True)
            for _ in range(wanted.n)
        ]
        if not asked:
            return []
        texts = self._worker.generate(asked, max_tokens=max(p.max_tokens for p in params))
        if inspect.iscoroutine(texts):
            texts = asyncio.run(texts)
        # A text is a sequence of texts, too.
        is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
        name = f"{type(self._worker).__name__}.generate"
        if not is_list or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} must return a list of texts, got {reprlib.repr(texts)}")
        if len(texts) != len(asked):
            raise ValueError(
                f"{name} must return one text per prompt, got {len(texts)} for {len(asked)} prompts"
            )
        answers = iter(texts)
        return [[self._completion(next(answers), p.max_tokens) for _ in range(p.n)] for p in params]

    def _completion(self, text: str, max_tokens: int) -> Completion:
        ids = self._codec.encode_answer(text)
        cut = len(ids) > max_tokens
        return Completion(ids[:max_tokens], None, "length" if cut else "stop", self.version, text)
