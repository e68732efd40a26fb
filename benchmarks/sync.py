"""Bytes and seconds of a weight update of engines, against a plain load of the full state in this process.

.venv/bin/python benchmarks/sync.py                      # servers of the embedded engine
.venv-engines/bin/python benchmarks/sync.py --vllm       # vLLM in this process (make engines)
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.roles import LoraConfig, RoleConfig
from verl.controller.worker_group import LocalPool
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.pretrained import load_language_model, make_tiny_model
from verl.engines.local import LocalEngine
from verl.rollout.actor_worker import ActorWorker
from verl.rollout.inference_server import ServerSpec
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.tokens import TextCodec
from verl.weight_sync.types import Transport

SIZES = {"1M": (128, 4), "26M": (512, 8)}
CPU = torch.device("cpu")


def policy_of(folder: Path, *, lora_rank: int = 0) -> tuple[PolicyModel, Any]:
    """Policy of a folder, and its group of one rank in this process."""
    policy = PolicyModel(load_language_model(str(folder)), "fp32")
    engine = LocalEngine(policy, RoleConfig(lora=LoraConfig(rank=lora_rank)), device=CPU, total_updates=1)
    codec, options = (
        TextCodec.load(str(folder)),
        {"max_slots": 8, "temperature": 1.0, "epochs": 1, "chunk": 4096},
    )
    return policy, LocalPool().start(
        "policy", lambda: ActorWorker(engine, Algorithm.bind(AlgorithmConfig()), codec, **options)
    )


@contextmanager
def pool(
    folder: Path, place: Path, transport: Transport | None, count: int, *, lora_rank: int = 0
) -> Iterator[ThreadedInferencePool]:
    """Servers that receive the policy's weights."""
    policy, group = policy_of(folder, lora_rank=lora_rank)
    specs = [
        ServerSpec(
            f"engine-{i}", str(folder), transport=transport, secret="benchmark", log=place / f"{i}.log"
        )
        for i in range(count)
    ]
    weights = WeightPublisher(group, "float32", place / "weights")
    size = policy.transformer.config.vocab_size
    with closing(
        ThreadedInferencePool(
            specs, EmbeddedServer, TextCodec.load(str(folder)), weights, vocabulary=size, context=1024
        )
    ) as made:
        yield made


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds, after one call to warm up."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def row(size: str, way: str, num_bytes: float, *, write_s: float = 0, load_s: float) -> None:
    print(
        f"| {size} | {way} | {num_bytes / 1e6:.2f} | {write_s * 1e3:.1f} | {load_s * 1e3:.1f} |", flush=True
    )


def servers(size: str, folder: Path, place: Path, rounds: int) -> None:
    """Measure each transport to servers of the embedded engine."""
    ways: list[tuple[str, Transport | None, int, int]] = [
        ("shared memory, 1 server", "shm", 1, 0),
        ("shared memory, 2 servers", "shm", 2, 0),
        ("process group (gloo), 1 server", "group", 1, 0),
        ("files, 1 server", "disk", 1, 0),
        ("LoRA adapter of rank 8 alone, 1 server", None, 1, 8),
    ]
    for way, transport, count, rank in ways:
        with pool(folder, place, transport, count, lora_rank=rank) as made:
            made.run(made.sync_weights(1))
            made.take_metrics()
            taken = []
            for version in range(rounds):
                made.run(made.sync_weights(2 + version))
                taken.append(made.take_metrics())
        write, load = (
            statistics.median(t[f"time/sync_{part}_s"] for t in taken) for part in ("write", "load")
        )
        row(size, way, taken[0]["engines/sync_bytes"], write_s=write, load_s=load)


def plain(size: str, folder: Path, rounds: int) -> None:
    """Measure a load of the full state into another model of this process, as Transformers and vLLM do it."""
    one, other = (load_language_model(str(folder)) for _ in range(2))
    seconds = timed(lambda: other.load_state_dict(one.state_dict()), rounds)
    num_bytes = sum(p.nbytes for p in one.parameters())
    row(size, "plain load_state_dict, same process", num_bytes, load_s=seconds)


def vllm(size: str, folder: Path, rounds: int) -> None:
    """Measure vLLM in this process: our update with fingerprints, and its plain reload."""
    engine_class = import_module("verl.rollout.vllm.in_process").VLLMEngine
    model = load_language_model(str(folder))
    num_bytes = sum(p.nbytes for p in model.parameters())
    options = {"max_model_len": 128}
    with closing(
        engine_class(str(folder), TextCodec.load(str(folder)), options=options, dtype="float32", max_slots=8)
    ) as engine:
        ours = timed(lambda: engine.load(model.named_parameters(), 1), rounds)
        row(size, "vLLM in process, with digests and a check of completeness", num_bytes, load_s=ours)

        def reload(worker: Any) -> None:
            worker.model_runner.reload_weights(weights_iterator=iter(dict(model.state_dict()).items()))

        theirs = timed(lambda: engine._llm.collective_rpc(reload), rounds)
        row(size, "vLLM in process, plain reload_weights of the full state", num_bytes, load_s=theirs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vllm", action="store_true", help="measure only vLLM in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    print("| Parameters | Way | MB | write, ms | load, ms |\n| --- | --- | --- | --- | --- |")
    for size, (hidden, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            make_tiny_model(folder, hidden=hidden, layers=layers)
            plain(size, folder, args.rounds)
            (
                vllm(size, folder, args.rounds)
                if args.vllm
                else servers(size, folder, Path(place), args.rounds)
            )


if __name__ == "__main__":
    main()
