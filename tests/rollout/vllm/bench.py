"""A real vLLM server with a tiny model, for tests, and the weights that it should have."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import random_prompts, tiny_codec, tiny_transformer
from verl.rollout.inference_server import ServerSpec, TokenChunk
from verl.rollout.vllm.server import VLLMServer
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of
from verl.weight_sync.types import TensorInfo, WeightChunk

# Plugins of other packages beside vLLM are none of ours.
os.environ.setdefault("VLLM_PLUGINS", "")
# vLLM's kernels for CPUs have no heads of fewer than 32 values.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8}
SECRET = "an open secret"
PROMPTS = random_prompts([3, 11, 1, 6])
ENDS = tuple(range(20, 32))
FREE = SamplingParams(max_tokens=24)


def saved(family: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model that is also in a folder, with its tokenizer."""
    model = tiny_transformer(family, seed=seed, **SIZES)
    model.save_pretrained(folder)
    tiny_codec().tokenizer.save_pretrained(folder)
    return model


class Bench:
    """A server, and the model whose weights it should have."""

    def __init__(self, model: PreTrainedModel, spec: ServerSpec) -> None:
        self.model, self.engine = model, VLLMServer(spec)
        self.loop = asyncio.new_event_loop()

    def run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 300))

    def answer(self, prompt: list[int], params: SamplingParams = FREE, *, seed: int = 0) -> TokenChunk:
        return self.run(whole(self.engine.sample(prompt, replace(params, sample_index=seed))))

    def refresh(self, *, seed: int) -> dict[str, Tensor]:
        """Change the model and return its weights by name as in a folder, without a tied head."""
        fresh = tiny_transformer(
            self.model.config.model_type,
            seed=seed,
            **SIZES,
            tie_word_embeddings=self.model.config.tie_word_embeddings,
        )
        self.model.load_state_dict(fresh.state_dict())
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}


async def whole(chunks: AsyncIterator[TokenChunk]) -> TokenChunk:
    """The chunks of an answer as one."""
    ids, logprobs, reason = [], [], None
    async for chunk in chunks:
        assert reason is None and len(chunk.token_ids) == len(chunk.logprobs)
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        reason = chunk.finish_reason
    assert reason is not None
    return TokenChunk(ids, logprobs, reason)


@contextlib.contextmanager
def serving(family: str, folder: Path, **changes: Any) -> Iterator[Bench]:
    """A server that runs, and leaves no process behind."""
    spec = ServerSpec(
        f"tiny {family}",
        str(folder),
        OPTIONS,
        secret=SECRET,
        log=folder / "engine.log",
        timeout_s=60,
        start_timeout_s=300,
    )
    bench = Bench(
        saved(family, folder),
        replace(spec, **{"options": {**OPTIONS, **changes.pop("options", {})}, **changes}),
    )
    bench.run(bench.engine.open())
    pid = bench.engine._process.pid
    assert processes_of(pid)
    try:
        yield bench
    finally:
        bench.run(bench.engine.close())
        bench.loop.close()
    assert_gone(pid)


def assert_gone(group: int) -> None:
    """Killed processes take a moment to be gone."""
    give_up = time.monotonic() + 30
    while left := processes_of(group):
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def processes_of(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = status.read_text().rpartition(")")[2].split()[:3]
            found += [int(status.parent.name)] if int(of_group) == group and state != "Z" else []
    return found


def own_logprobs(
    model: PreTrainedModel, prompt: list[int], ids: list[int], params: SamplingParams = FREE
) -> list[float]:
    """Logprobs of an answer by the model's own forward, one truncation rule after the other."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    probs = (logits / (params.temperature or 1)).softmax(-1)
    logprobs = []
    for row, token in zip(probs, ids, strict=True):
        kept = kept_by_hand(row.tolist(), params)
        assert token in kept
        logprobs.append(float((row[token] / row[sorted(kept)].sum()).log()))
    return logprobs


def kept_by_hand(probs: list[float], params: SamplingParams) -> set[int]:
    """Tokens kept in the order of vLLM: min-p, then top-k of the rest, then the nucleus of the rest."""
    likely = [token for token in range(len(probs)) if probs[token] >= params.min_p * max(probs)]
    best = sorted(likely, key=lambda token: -probs[token])[: params.top_k or None]
    kept, mass, whole_mass = set(), 0.0, sum(probs[token] for token in best)
    for token in best:
        if mass < params.top_p * whole_mass:
            kept.add(token)
        mass += probs[token]
    return kept


def assert_follows(
    bench: Bench, answer: TokenChunk, prompt: list[int], params: SamplingParams = FREE
) -> None:
    assert answer.logprobs == pytest.approx(
        own_logprobs(bench.model, prompt, list(answer.token_ids), params), abs=1e-4
    )


def infos_of(tensors: Mapping[str, Tensor]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
    )


def bytes_of(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors.values()])


def shared(tensors: Mapping[str, Tensor], path: Path) -> WeightChunk:
    infos = infos_of(tensors)
    make_file(path, num_bytes_of(infos))
    map_file(path, num_bytes_of(infos), for_writing=True).copy_(bytes_of(tensors))
    return WeightChunk(infos, "shm", {"path": path})


def print_of(tensors: Mapping[str, Tensor]) -> str:
    return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


async def update(engine: VLLMServer, parts: list[WeightChunk], version: int) -> str:
    await engine.pause()
    try:
        await engine.begin_update()
        for part in parts:
            await engine.load(part)
        return await engine.end_update(version)
    finally:
        await engine.resume()


async def counted(engine: VLLMServer, *names: str) -> float:
    """The sum of figures of the server."""
    async with engine.client.session.get(f"{engine.client.address}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(tuple(f"{name}{{" for name in names))
    )
