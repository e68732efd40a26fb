"""Users' own text workers behind the contract of generation."""

from __future__ import annotations

import asyncio
import inspect
import reprlib
from collections.abc import Sequence

from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import BatchGenerator, Completion, SamplingParams
from verl.utils.tokens import TextCodec


class TextWorkerGenerator(BatchGenerator):
    """Lets a `BaseRolloutWorker` answer: its texts are tokenized once, and have no logprobs.

    The worker gets the prompt as the model would read it (chat template applied), `n` times, and is told the
    largest `max_tokens` only; temperature and the like are its own business.
    """

    def __init__(self, worker: BaseRolloutWorker, codec: TextCodec) -> None:
        self._worker = worker
        self._codec = codec

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See `BatchGenerator.generate`.

        Raises:
            ValueError: the worker gave something else than a list with one text per prompt.
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
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError(
                f"{type(self._worker).__name__}.generate must return a list of texts, got {reprlib.repr(texts)}"
            )
        if len(texts) != len(asked):
            raise ValueError(
                f"{type(self._worker).__name__}.generate must return one text per prompt, got {len(texts)} for {len(asked)} prompts"
            )
        answers = iter(texts)
        return [[self._completion(next(answers), p.max_tokens) for _ in range(p.n)] for p in params]

    def _completion(self, text: str, max_tokens: int) -> Completion:
        ids = self._codec.encode_answer(text)
        cut = len(ids) > max_tokens
        return Completion(ids[:max_tokens], None, "length" if cut else "stop", self.version, text)
