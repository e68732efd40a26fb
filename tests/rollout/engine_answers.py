"""Answers of an engine behind HTTP, and those of the embedded engine with the same weights, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from verl.engines.hf.models import PolicyModel
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.inference_server import (
    InferenceServer,
    TokenChunk,
)
from verl.utils.sampling_types import Completion, SamplingParams
from verl.utils.tokens import TextCodec

T = TypeVar("T")
PROMPT = [40, 50, 60, 70]
LOOP = asyncio.new_event_loop()


def run(work: Coroutine[Any, Any, T]) -> T:
    """In the one loop in which the engines live; nothing here takes half a minute."""
    return LOOP.run_until_complete(asyncio.wait_for(work, 60))


def policy(folder: Path) -> PolicyModel:
    return PolicyModel(load_language_model(str(folder)), "fp32")


def own_answer(model: PolicyModel, folder: Path, params: SamplingParams, seed: int) -> Completion:
    engine = EmbeddedEngine(model, TextCodec.load(str(folder)))
    return engine.generate([PROMPT], [SamplingParams(**{**vars(params), "seed": seed})])[0][0]


async def answer(
    engine: InferenceServer, params: SamplingParams, *, seed: int = 0, prompt: list[int] = PROMPT
) -> list[TokenChunk]:
    return [chunk async for chunk in engine.sample(prompt, replace(params, seed=seed))]


def ids(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def logprobs(chunks: list[TokenChunk]) -> list[float]:
    return [logprob for chunk in chunks for logprob in chunk.logprobs]
