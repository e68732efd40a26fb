"""vLLM in the trainer's process, as a generation engine; the only module there that imports vLLM."""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from verl.rollout.inference_server import ColocatedEngine, request_seed
from verl.rollout.vllm.options import FINISH_REASONS, has_accelerator, missing_weights, run_options
from verl.rollout.vllm.versions import (
    BEGIN_UPDATE,
    END_UPDATE,
    LOAD_CHUNK,
    check_version,
    cpu_environment,
    installed_version,
    worker_method,
)
from verl.utils.network import socket_folder
from verl.utils.sampling_types import Completion, SamplingParams, check_requests
from verl.utils.tokens import TextCodec
from verl.weight_sync.fingerprint import fingerprint
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of
from verl.weight_sync.types import TensorInfo

# Its processes find each other by sockets in this folder.
os.environ.setdefault("VLLM_RPC_BASE_PATH", socket_folder())
if not has_accelerator():
    # vLLM reads these when it is imported. In processes of its own it would take ten times as long to start,
    # without any gain on a CPU.
    for _name, _value in {
        **cpu_environment(installed_version()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }.items():
        os.environ.setdefault(_name, _value)

import vllm
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

_SHARED_MEMORY = Path("/dev/shm")
_CHUNK_BYTES = 2**28


class VLLMEngine(ColocatedEngine):
    """Generates with a copy of the policy in vLLM; `load` updates the copy.

    Args:
        folder: of the initial policy, with its tokenizer.
        codec: tokenizer of the policy.
        options: arguments of `vllm.LLM`, passed on unchanged.
        dtype: of the served weights, as PyTorch names it.
        max_slots: answers generated at the same time, unless the options have `max_num_seqs`.

    Raises:
        ValueError: vLLM refuses an option, an option is one that the run sets, or vLLM's version is too old.
    """

    def __init__(
        self, folder: str, codec: TextCodec, *, options: Mapping[str, Any], dtype: str, max_slots: int
    ) -> None:
        self.version = 0
        self._codec = codec
        check_version(vllm.__version__, "in the environment of the run")
        own = run_options(options, vllm.__version__, model=folder, dtype=dtype)
        own = {name.replace("-", "_"): value for name, value in own.items()}
        if has_accelerator():
            # Training needs the memory between two generations.
            own["enable_sleep_mode"] = True
        else:
            own |= {"enforce_eager": True, "distributed_executor_backend": "uni"}
        try:
            self._llm = vllm.LLM(**{"max_num_seqs": max_slots, "disable_log_stats": True, **own, **options})
        except TypeError as error:  # of a constructor, about an argument that it does not have
            raise ValueError(f"rollout.engine_options: {error}") from error
        # On a CPU, sleep frees nothing, but the states are the same.
        self._can_sleep = options.get("enable_sleep_mode", True)
        self._context = self._llm.llm_engine.vllm_config.model_config.max_model_len
        self._is_open, self._is_updating, self._is_asleep = True, False, False

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        check_requests(prompts, params, context=self._context)
        if self._is_asleep:  # it would never answer
            raise RuntimeError("need weights in vLLM, which is asleep without any; load them first")
        pairs = [(list(p), wanted) for p, wanted in zip(prompts, params, strict=True)]
        inputs: list[Any] = [{"prompt_token_ids": p} for p, wanted in pairs for _ in range(wanted.n)]
        if not inputs:
            return []
        vllm_params = [
            self._vllm_params(replace(wanted, sample_index=wanted.sample_index + i))
            for wanted in params
            for i in range(wanted.n)
        ]
        outputs = self._llm.generate(inputs, vllm_params, use_tqdm=False)
        answers = iter([self._completion(each.outputs[0], each.num_cached_tokens) for each in outputs])
        return [[next(answers) for _ in range(wanted.n)] for wanted in params]

    @override
    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False
        if self._is_updating:  # vLLM still waits for the end of an earlier update that broke off
            self._update_step(END_UPDATE)
        self._update_step(BEGIN_UPDATE)
        self._is_updating = True
        folder_parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="verl-vllm-", dir=folder_parent) as folder:
            for number, chunk in enumerate(split_chunks(tensors)):
                path = Path(folder) / str(number)
                self._update_step(LOAD_CHUNK, update_info=write_chunk(chunk, path))
                path.unlink()
        first, *others = self._llm.collective_rpc("verl_update_report")
        self._update_step(END_UPDATE)
        self._is_updating = False
        if missing := sorted({name for report in (first, *others) for name in report["missing"]}):
            raise RuntimeError(f"vLLM: {missing_weights(missing)}")
        if any(report["digests"] != first["digests"] for report in others):
            raise RuntimeError("the ranks of vLLM took different weights")
        self._llm.reset_prefix_cache()
        self.version = version
        return fingerprint(first["digests"])

    @override
    def sleep(self) -> None:
        # Not if the option `enable_sleep_mode` is false.
        if not self._is_asleep and self._can_sleep:
            self._llm.sleep(level=2)
            self._is_asleep = True

    @override
    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _update_step(self, step: str, **arguments: Any) -> None:
        """Run a step of an update on all ranks, see `verl.rollout.vllm.versions`."""
        self._llm.collective_rpc(worker_method(vllm.__version__, step), kwargs=arguments)

    def _vllm_params(self, params: SamplingParams) -> vllm.SamplingParams:
        """Parameters of one answer to a prompt."""
        truncation = {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
        return vllm.SamplingParams(
            temperature=params.temperature,
            # The most likely token is drawn from the model's own distribution.
            **(truncation if params.temperature else {}),
            repetition_penalty=params.repetition_penalty,
            max_tokens=params.max_tokens,
            stop=list(params.stop),
            stop_token_ids=list(dict.fromkeys([*self._codec.stop_ids, *params.stop_ids])),
            seed=request_seed(params),
            logprobs=0,
            ignore_eos=True,
            detokenize=bool(params.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: CompletionOutput, num_reused: int | None) -> Completion:
        """Convert an answer; raise RuntimeError if it has no valid logprob for each token."""
        ids, reason = list(output.token_ids), output.finish_reason
        if reason not in FINISH_REASONS or output.logprobs is None or len(output.logprobs) != len(ids):
            counts = f"{len(ids)} tokens and {len(output.logprobs or ())} logprobs"
            raise RuntimeError(f"vLLM ended an answer with {reason!r}, {counts}")
        logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
        if not all(math.isfinite(logprob) for logprob in logprobs):
            raise RuntimeError(f"vLLM's logprobs are not finite: {logprobs[:8]}; look at the last updates")
        return Completion(ids, logprobs, FINISH_REASONS[reason], self.version, num_reused=num_reused)


def split_chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Split tensors into chunks of at most 256 MiB; a larger tensor is a chunk of its own.

    Each tensor is taken once, so the iterable may create them one by one.
    """
    chunk: list[tuple[str, Tensor]] = []
    left_bytes = _CHUNK_BYTES
    for name, tensor in tensors:
        if chunk and tensor.nbytes > left_bytes:
            yield chunk
            chunk, left_bytes = [], _CHUNK_BYTES
        chunk.append((name, tensor.detach()))
        left_bytes -= tensor.nbytes
    if chunk:
        yield chunk


def write_chunk(chunk: Sequence[tuple[str, Tensor]], path: Path) -> dict[str, Any]:
    """Write the bytes of tensors end to end into a file; return the fields of `worker.ChunkInfo` for them."""
    infos = [
        TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in chunk
    ]
    make_file(path, num_bytes_of(infos))
    content = map_file(path, num_bytes_of(infos), for_writing=True)
    start = 0
    for _, tensor in chunk:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        content[start : start + len(flat)].copy_(flat)
        start += len(flat)
    return {
        "transport": "shm",
        "tensors": [(info.name, list(info.shape), info.dtype) for info in infos],
        "location": {"path": str(path)},
    }
