"""Episodes of several turns: prompt tokens computed twice, seconds of rendering, and tokens/s beside tools.

Three parts: an episode of many turns on each engine; many episodes whose tools take some time, in three ways
that alternate in one run; the overhead of rendering a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from verl.engines.hf.models import PolicyModel
from verl.rollout.batching_engine import BatchingEngine
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.inference_server import ServerSpec
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.server_registry import server_class
from verl.utils.chat.turn_rendering import renderer_for
from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import Completion, PrefixAffinity, Prompt, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec, character_tokenizer

TURN_STRIDE = 1 << 40


@dataclass(frozen=True)
class Work:
    """Episodes that are measured.

    Attributes:
        episodes: at a time.
        turns: of each.
        prompt: tokens of the first prompt.
        given: tokens of a tool between two turns.
        longest: of a turn, tokens; it ends before by chance.
        tool_s: longest time of a tool; the times are uniform from 0.
    """

    episodes: int
    turns: int
    prompt: int = 64
    given: int = 32
    longest: int = 64
    tool_s: float = 0.0


def tiny_model(hidden: int, layers: int, context: int) -> PolicyModel:
    """A Llama with random weights and the character tokenizer."""
    tokenizer = character_tokenizer()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return PolicyModel(AutoModelForCausalLM.from_config(config).float().eval(), "fp32")


class Player:
    """Plays the episodes of a work on an engine, and counts tokens."""

    def __init__(self, engine: RolloutEngine, work: Work, seed: int) -> None:
        self.engine, self.work, self.seed = engine, work, seed
        self.sampled = self.history = self.reused = 0
        self.unknown = False
        # A geometric length: each of 100 characters ends a turn with the same small probability.
        ends = tuple(range(20, 24))
        self.params = SamplingParams(max_tokens=work.longest, stop_ids=ends, temperature=1.0)

    async def turn(self, episode: int, turn: int, history: list[int], affinity: PrefixAffinity) -> list[int]:
        """History behind one more turn and what the tool says, without the tool's time."""
        index = episode + turn * TURN_STRIDE
        params = replace(self.params, seed=self.seed, sample_index=index)
        completion: Completion = await self.engine.sample(history, params, affinity)
        self.sampled += len(completion.token_ids)
        self.history += len(history)
        self.unknown |= completion.num_reused is None
        self.reused += completion.num_reused or 0
        rng = random.Random(f"{self.seed} {episode} {turn}")
        given = [rng.randint(30, 90) for _ in range(self.work.given)]
        return [*history, *completion.token_ids, *given]

    def tool_s(self, episode: int, turn: int) -> float:
        """Seconds of the tool behind a turn."""
        return random.Random(f"{episode} {turn} {self.seed}").uniform(0, self.work.tool_s)

    def first(self, episode: int) -> list[int]:
        """The prompt of an episode."""
        rng = random.Random(f"{self.seed} {episode}")
        return [rng.randint(30, 90) for _ in range(self.work.prompt)]

    async def free(self, *, enters: bool) -> None:
        """Each episode goes on by itself; `enters`: the engine knows of the episodes."""

        async def play(episode: int) -> None:
            history, affinity = self.first(episode), PrefixAffinity()
            for turn in range(self.work.turns):
                history = await self.turn(episode, turn, history, affinity)
                await asyncio.sleep(self.tool_s(episode, turn))

        async def entered(episode: int) -> None:
            with self.engine.episode():
                await play(episode)

        numbers = range(self.work.episodes)
        await gather_all([(entered if enters else play)(episode) for episode in numbers])

    async def in_lock_step(self) -> None:
        """All episodes take a turn together, and wait for the slowest tool."""
        histories = [self.first(episode) for episode in range(self.work.episodes)]
        for turn in range(self.work.turns):
            histories = await gather_all(
                [self.turn(i, turn, h, PrefixAffinity()) for i, h in enumerate(histories)]
            )
            await asyncio.sleep(max(self.tool_s(i, turn) for i in range(self.work.episodes)))


def many_episodes(model: PolicyModel, codec: TextCodec, work: Work, rounds: int) -> dict[str, Any]:
    """Sampled tokens per second of three ways, which alternate."""
    ways: dict[str, Callable[[Player], Any]] = {
        "as before": lambda player: player.free(enters=False),
        "lock-step": lambda player: player.in_lock_step(),
        "turns join": lambda player: player.free(enters=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    reused: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            engine = BatchingEngine(EmbeddedEngine(model, codec))
            player = Player(engine, work, number)
            begun_s = time.perf_counter()
            engine.run(way(player))
            seconds = time.perf_counter() - begun_s
            engine.close()
            reused[name] = player.reused / player.history
            if number:  # the first round warms up
                rates[name].append(player.sampled / seconds)
    return {
        name: {
            "tokens_per_s": statistics.median(own),
            "ratio": statistics.median([a / b for a, b in zip(own, rates["as before"], strict=True)]),
            "all": own,
            "reused_share": reused[name],
        }
        for name, own in rates.items()
    }


@contextmanager
def engine_of(name: str, model: PolicyModel, codec: TextCodec, folder: Path) -> Iterator[RolloutEngine]:
    """An engine with the weights of the model."""
    if name.startswith("embedded"):
        tokens = 0 if name == "embedded-0" else None  # nothing is kept of earlier turns
        with closing(BatchingEngine(EmbeddedEngine(model, codec, prefix_tokens=tokens))) as engine:
            yield engine
        return
    saved = folder / "model"
    model.transformer.save_pretrained(saved)
    codec.tokenizer.save_pretrained(saved)
    make = server_class(name)
    options: dict[str, Any] = {"vllm": {"max_model_len": model.context}}.get(name, {})
    spec = ServerSpec(name, str(saved), options, secret="benchmark", log=folder / f"{name}.log")
    make.syncs_weights = False  # it serves the model as it was saved
    config = model.transformer.config
    pool = ThreadedInferencePool(
        [spec], make, codec, None, vocabulary=config.vocab_size, context=model.context
    )
    with closing(pool):
        yield pool


def long_episode(
    name: str, model: PolicyModel, codec: TextCodec, turns: int, folder: Path
) -> dict[str, float | None]:
    """One episode of many turns: tokens of its histories, and those that were computed again."""
    work = Work(episodes=1, turns=turns, longest=32)
    with engine_of(name, model, codec, folder) as engine:
        player = Player(engine, work, 1)
        begun_s = time.perf_counter()
        engine.run(player.free(enters=True))
        seconds = time.perf_counter() - begun_s
    length = work.prompt + player.sampled + work.given * (turns - 1)
    computed = None if player.unknown else player.history - player.reused
    return {
        "seconds": seconds,
        "tokens": length,
        "history_tokens": player.history,
        "computed": computed,
        # The tokens of an answer are computed when the next one is sampled, the last one in the next turn. So
        # all tokens of the episode but the very last one must be computed, once each.
        "computed_twice": None if computed is None else computed + player.sampled - turns - (length - 1),
    }


def rendering(codec: TextCodec, turns: int) -> dict[str, float]:
    """Milliseconds of rendering what follows a turn, at the beginning and the end of a long episode."""
    renderer = renderer_for(codec, Prompt([{"role": "user", "content": "2+3?"}]))
    renderer.start([{"role": "user", "content": "2+3?"}])
    seconds = []
    for turn in range(turns):
        begun_s = time.perf_counter()
        message, sampled = (
            {"role": "assistant", "content": f"call {turn}"},
            codec.encode_answer(f"call {turn}"),
        )
        renderer.follow(message, [{"role": "user", "content": f"result {turn}"}], sampled=sampled)
        seconds.append(time.perf_counter() - begun_s)
    quarter = turns // 4
    first, last = (1000 * statistics.median(part) for part in (seconds[:quarter], seconds[-quarter:]))
    return {"first_ms": first, "last_ms": last}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default="embedded,embedded-0,served")
    parser.add_argument("--turns", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    codec = TextCodec(character_tokenizer())
    figures: dict[str, Any] = {}
    if args.rounds:
        model = tiny_model(128, 4, 1024)
        for tool_s in (0.0, 0.05):
            work = Work(args.episodes, 4, tool_s=tool_s)
            figures[f"tools of 0-{1000 * tool_s:.0f} ms"] = many_episodes(model, codec, work, args.rounds)
    model = tiny_model(128, 4, 16_384)
    for name in filter(None, args.engines.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = long_episode(name, model, codec, args.turns, Path(folder))
    figures["rendering of a turn"] = rendering(codec, args.turns)
    for name, own in figures.items():
        print(name, json.dumps(own))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
