"""A real SGLang server with a tiny model, for tests, and the weights that it should have."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tests.tiny import kept_by_hand, random_prompts, tiny_codec, tiny_transformer
from verl.rollout.inference_server import EngineError, ServerSpec, TokenChunk
from verl.rollout.pool.broadcast import Broadcaster
from verl.rollout.sglang.server import SGLangServer
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of
from verl.weight_sync.types import TensorInfo, WeightChunk

SECRET = "s3cret-of-the-tests"
FAMILY = "qwen2"
PROMPTS = random_prompts([3, 11, 1, 6])
# Room for an answer that takes seconds.
CONTEXT = 4096
Result = TypeVar("Result")


@dataclass
class Running:
    """A server, the loop that asks it, and the weights that it was last given."""

    engine: SGLangServer
    loop: asyncio.AbstractEventLoop
    model: Any
    version: int = 0

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def answer(self, prompt: Sequence[int], params: SamplingParams, *, seed: int = 0) -> TokenChunk:
        return self.run(whole(self.engine, prompt, params, seed=seed))


@contextmanager
def serving(spec: ServerSpec) -> Iterator[Running]:
    """A server that runs, and leaves no process behind."""
    loop = asyncio.new_event_loop()
    engine = SGLangServer(spec)
    loop.run_until_complete(engine.open())
    try:
        yield Running(engine, loop, tiny_transformer(FAMILY))
    finally:
        pid = engine._process.pid
        loop.run_until_complete(engine.close())
        loop.close()
    assert gone(pid)


async def whole(
    engine: SGLangServer, prompt: Sequence[int], params: SamplingParams, *, seed: int = 0
) -> TokenChunk:
    """All chunks of an answer as one."""
    ids: list[int] = []
    logprobs: list[float] = []
    async for chunk in engine.sample(prompt, replace(params, sample_index=seed)):
        ids.extend(chunk.token_ids)
        logprobs.extend(chunk.logprobs)
    return TokenChunk(ids, logprobs, chunk.finish_reason, chunk.version)


def spec_of(folder: Path, *, family: str = FAMILY, **changes: Any) -> ServerSpec:
    model = folder / "model"
    if not model.exists():
        tiny_transformer(family, max_position_embeddings=CONTEXT).save_pretrained(model)
        tiny_codec().tokenizer.save_pretrained(model)
    options = {
        "max_running_requests": 16,
        "enable_lora": True,
        "max_lora_rank": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    spec = ServerSpec(
        "sglang-0",
        str(model),
        options,
        secret=SECRET,
        log=folder / "engine.log",
        timeout_s=20,
        start_timeout_s=300,
    )
    return replace(spec, **changes)


def gone(group: int) -> bool:
    """Killed processes take a moment to be gone."""
    give_up = time.monotonic() + 30
    while left_in_group(group) and time.monotonic() < give_up:
        time.sleep(0.1)
    return left_in_group(group) == []


def left_in_group(group: int) -> list[str]:
    """Processes of a group that are alive."""
    rows = subprocess.run(
        ["ps", "-eo", "pgid=,stat=,args="], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [row for row in rows if int(row.split()[0]) == group and not row.split()[1].startswith("Z")]


def expected_logprobs(
    model: Any, prompt: Sequence[int], ids: Sequence[int], params: SamplingParams
) -> list[float]:
    """By the trainer's own forward, of the distribution that each id was drawn from."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = []
    for row, token in zip(logits / (params.temperature or 1.0), ids, strict=True):
        probs = row.softmax(-1)
        kept = kept_by_hand(probs.tolist(), params) if params.temperature > 0 else set(range(len(probs)))
        assert token in kept
        expected.append(float(probs[token].log() - probs[sorted(kept)].sum().log()))
    return expected


def assert_is_of(running: Running, prompt: Sequence[int], answer: TokenChunk, params: SamplingParams) -> None:
    expected = expected_logprobs(running.model, prompt, answer.token_ids, params)
    torch.testing.assert_close(torch.tensor(list(answer.logprobs)), torch.tensor(expected), atol=1e-4, rtol=0)


async def until(condition: Any, *, limit_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if await condition():
            return True
        await asyncio.sleep(0.05)
    return False


async def is_idle(engine: SGLangServer) -> bool:
    """A cache can be flushed while no request needs it."""
    try:
        await engine.client.command("/flush_cache")
    except EngineError:
        return False
    return True


def changed_model(seed: int) -> Any:
    return tiny_transformer(FAMILY, seed=seed)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """As a Hugging Face folder has them: a tied head is not among them."""
    is_tied = model.config.tie_word_embeddings
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not is_tied
    }


def parts_of(tensors: dict[str, torch.Tensor], folder: Path, count: int = 3) -> list[WeightChunk]:
    """The tensors in some files, as the pool writes them."""
    names = list(tensors)
    parts = []
    for number in range(count):
        infos = tuple(
            TensorInfo(name, tuple(tensors[name].shape), "float32") for name in names[number::count]
        )
        path = folder / f"part-{number}-{time.monotonic_ns()}"
        make_file(path, num_bytes_of(infos))
        content = torch.cat([tensors[info.name].view(-1).view(torch.uint8) for info in infos])
        map_file(path, len(content), for_writing=True).copy_(content)
        parts.append(WeightChunk(infos, "shm", {"path": str(path)}))
    return parts


def print_of(tensors: dict[str, torch.Tensor]) -> str:
    return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


async def updated(running: Running, parts: Sequence[WeightChunk], *, group: Broadcaster | None = None) -> str:
    """An update of a server as the pool makes it."""
    engine = running.engine
    running.version += 1
    await engine.pause()
    await engine.begin_update()
    for part in parts:
        await (engine.load(part) if group is None else group.send(part, engine))
    got = await engine.end_update(running.version)
    await engine.resume()
    return got


async def through_group(running: Running, parts: Sequence[WeightChunk]) -> str:
    """An update by broadcasts, as the pool makes it for an engine on another machine."""
    return await updated(running, parts, group=await Broadcaster.connect(running.engine))


def assert_serves(running: Running, model: Any) -> None:
    running.model = model
    answer = running.answer(PROMPTS[1], SamplingParams(max_tokens=20))
    assert answer.version == running.version
    assert_is_of(running, PROMPTS[1], answer, SamplingParams(max_tokens=20))
