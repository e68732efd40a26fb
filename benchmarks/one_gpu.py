"""Tokens per second of the FSDP2 engine and the embedded engine on one GPU, for models like Qwen2.5.

The weights are random. The same run measures the rates of the card in a large matrix product and a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.data.batch import Batch
from verl.data.packing import balance
from verl.data.trajectory import Trajectory
from verl.engines.fsdp import sharded_engine
from verl.engines.hf.models import PolicyModel
from verl.engines.minibatches import write_loss_weights
from verl.engines.roles.policy import PolicyWorker
from verl.planner.step_time import ModelShape, StepWork, forward_flops, rollout_seconds
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.device import MachineSpeed, measure_speed, synchronize
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec, character_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def build(size: str, device: torch.device) -> PreTrainedModel:
    """A model with random weights in fp32."""
    config = Qwen2Config(
        **SHAPES[size], vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A world of this process alone."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rows_of(args: argparse.Namespace, vocabulary: int) -> Batch:
    """Answers of equal length, as after a rollout."""
    generator = torch.Generator().manual_seed(0)

    def row(number: int) -> Trajectory:
        prompt, answer = (
            torch.randint(vocabulary, (n,), generator=generator).tolist()
            for n in (args.prompt_tokens, args.new_tokens)
        )
        return Trajectory(
            Prompt(""), prompt, answer, [True] * len(answer), [-12.0] * len(answer), [0] * len(answer), number
        )

    rows = Batch.from_trajectories([row(number) for number in range(args.rows)])
    shape = (args.rows, args.new_tokens)
    rows.write("advantages", torch.ones(shape))
    rows.write("old_logprobs", torch.full(shape, -12.0))
    return rows


def train(size: str, args: argparse.Namespace, device: torch.device, speed: MachineSpeed) -> dict[str, Any]:
    """Tokens per second of updates of the FSDP2 engine in bf16."""
    algorithm = Algorithm.bind(
        AlgorithmConfig(advantage=Choice(name="grpo"), policy_loss=Choice(name="ppo_clip"))
    )
    with tempfile.TemporaryDirectory() as folder, one_rank(device):
        build(size, device).save_pretrained(folder)
        role = RoleConfig(precision="bf16", gradient_checkpointing=args.recompute)
        engine = sharded_engine(folder, "policy", role, ParallelConfig(), device=device, total_updates=100)
        worker = PolicyWorker(engine, algorithm, temperature=1.0, epochs=1, chunk=args.chunk)
        shape = ModelShape.from_hf_config(engine.config)
        rows, seconds = rows_of(args, shape.vocab), []
        plan = balance(rows.num_tokens, num_ranks=1, micro_batch_tokens=args.micro_batch_tokens)
        write_loss_weights(rows, plan, algorithm)
        for _ in range(args.repeats + 1):
            synchronize(device)
            start_s = time.perf_counter()
            worker.update(rows, plan, 0.0)
            synchronize(device)
            seconds.append(time.perf_counter() - start_s)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    took_s = min(seconds[1:])
    lengths = torch.full((args.rows,), args.prompt_tokens), torch.full((args.rows,), args.new_tokens)
    flops = 3 * float(forward_flops(shape, *lengths).sum())
    return {
        "what": "FSDP2 update",
        "size": size,
        "tokens_per_s": args.rows * (args.prompt_tokens + args.new_tokens) / took_s,
        "seconds": seconds,
        "tflops": flops / took_s / 1e12,
        "share_of_matrix_rate": flops / took_s / speed.flops_per_s,
        "peak_bytes": memory,
    }


def generate(
    size: str, args: argparse.Namespace, device: torch.device, speed: MachineSpeed
) -> dict[str, Any]:
    """Tokens per second of the embedded engine in bf16."""
    transformer = build(size, device)
    shape = ModelShape.from_hf_config(transformer.config)
    engine = EmbeddedEngine(
        PolicyModel(transformer, "bf16"),
        TextCodec(character_tokenizer()),
        max_slots=args.prompts * args.answers,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        100, shape.vocab, (args.prompts, args.prompt_tokens), generator=generator
    ).tolist()
    seconds = []
    tokens = 0
    for length in (16, *[args.new_tokens] * args.repeats):
        synchronize(device)
        start_s = time.perf_counter()
        answers = engine.generate(
            prompts, [SamplingParams(n=args.answers, max_tokens=length, seed=i) for i in range(len(prompts))]
        )
        synchronize(device)
        seconds.append(time.perf_counter() - start_s)
        tokens = sum(len(answer.token_ids) for group in answers for answer in group)
    num_rows = args.prompts * args.answers
    work = StepWork(
        prompt_lengths=torch.full((num_rows,), args.prompt_tokens),
        response_lengths=torch.full((num_rows,), args.new_tokens),
        num_prompts=args.prompts,
        updates=1,
        max_slots=num_rows,
        bytes_per_weight=2,
    )
    return {
        "what": "embedded engine",
        "size": size,
        "tokens_per_s": tokens / min(seconds[1:]),
        "seconds": seconds,
        "limit_tokens_per_s": num_rows * args.new_tokens / rollout_seconds(shape, work, speed),
    }


def main() -> None:
    """Measure and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--what", nargs="+", choices=("train", "generate"), default=["train", "generate"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--micro-batch-tokens", type=int, default=24576)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = measure_speed(device, torch.bfloat16)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(
        json.dumps(
            {
                "device": name,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **vars(speed),
            }
        ),
        flush=True,
    )
    for size in args.sizes:
        for what in args.what:
            print(
                json.dumps({"train": train, "generate": generate}[what](size, args, device, speed)),
                flush=True,
            )


if __name__ == "__main__":
    main()
