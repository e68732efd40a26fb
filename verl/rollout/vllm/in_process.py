"""vLLM in the process of the trainer, behind the contract of generation; the only module that imports vLLM
there.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl.rollout.engine import ColocatedEngine, request_seed
from verl.rollout.vllm.options import REASONS, has_accelerator, lacking, own_options
from verl.rollout.vllm.versions import BEGIN, END, LOAD, check_version, cpu_environment, installed, method_of
from verl.utils.sampling_types import Completion, SamplingParams, check_requests
from verl.utils.tokens import TextCodec
from verl.weight_sync.fingerprint import fingerprint
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of
from verl.weight_sync.types import TensorInfo

if not has_accelerator():
    # Read by vLLM when it is imported. In processes of its own it takes ten times as long to start, and gains
    # nothing.
    for _name, _value in {**cpu_environment(installed()), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        os.environ.setdefault(_name, _value)

import vllm
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

_SHARED = Path("/dev/shm")
_PART_BYTES = 2**28


class VLLMEngine(ColocatedEngine):
    """Answers prompts with a copy of the policy in vLLM; `load` makes it the policy of now.

    Args:
        folder: of the policy as it was at the start, with its tokenizer.
        codec: tokenizer of the policy.
        options: arguments of `vllm.LLM`, passed on as they are.
        dtype: of the weights that it serves, as PyTorch names it.
        max_slots: answers generated at the same time, unless the options say `max_num_seqs`.

    Raises:
        ValueError: vLLM refuses an option, in its own words, or one that is set here; its version is too old.
    """

    def __init__(
        self, folder: str, codec: TextCodec, *, options: Mapping[str, Any], dtype: str, max_slots: int
    ) -> None:
        self.version = 0
        self._codec = codec
        check_version(vllm.__version__, "in the environment of the run")
        own = own_options(options, {"model": folder, "dtype": dtype}, vllm.__version__)
        # Its memory is wanted for training between two generations.
        fitting = (
            {"enable_sleep_mode": True}
            if has_accelerator()
            else {"enforce_eager": True, "distributed_executor_backend": "uni"}
        )
        named = {name.replace("-", "_"): value for name, value in own.items()}
        try:
            self._llm = vllm.LLM(
                **{"max_num_seqs": max_slots, "disable_log_stats": True, **fitting, **named, **options}
            )
        except TypeError as error:  # what a constructor says to an argument that it does not have
            raise ValueError(f"rollout.engine_options: {error}") from error
        # On a CPU nothing is given back, but the states are the same.
        self._may_sleep = options.get("enable_sleep_mode", True)
        config = self._llm.llm_engine.vllm_config.model_config
        self._context = config.max_model_len
        self._is_open, self._is_updating, self._sleeps = True, False, False

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context.
            RuntimeError: vLLM gave something else than was asked for, or logprobs that are no numbers.
        """
        check_requests(prompts, params, context=self._context)
        inputs: list[Any] = [
            {"prompt_token_ids": list(p)}
            for p, wanted in zip(prompts, params, strict=True)
            for _ in range(wanted.n)
        ]
        if not inputs:
            return []
        asked = [
            self._asked(wanted, number)
            for wanted in params
            for number in range(wanted.sample_index, wanted.sample_index + wanted.n)
        ]
        outputs = iter(self._llm.generate(inputs, asked, use_tqdm=False))
        return [[self._completion(next(outputs).outputs[0]) for _ in range(wanted.n)] for wanted in params]

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Takes all weights, and samples with them from now on; wakes if it sleeps.

        Args:
            tensors: name as in a Hugging Face folder, and value; each is used once, so they may be made one
                by one.
            version: of the policy.

        Returns:
            The `fingerprint` of the digests of the tensors, as they were handed to vLLM's model.

        Raises:
            RuntimeError: there are parameters that no tensor reached, or the ranks took different ones.
        """
        if self._sleeps:
            self._llm.wake_up()
            self._sleeps = False
        with tempfile.TemporaryDirectory(
            prefix="verl-vllm-", dir=_SHARED if os.access(_SHARED, os.W_OK) else None
        ) as folder:
            self._begin()
            for number, part in enumerate(_in_parts(tensors)):
                self._step(LOAD, update_info=_written(part, Path(folder) / str(number)))
                (Path(folder) / str(number)).unlink()
        first, *others = self._llm.collective_rpc("verl_report")
        self._step(END)
        self._is_updating = False
        if missing := sorted({name for report in (first, *others) for name in report["missing"]}):
            raise RuntimeError(f"vLLM: {lacking(missing)}")
        if any(report["digests"] != first["digests"] for report in others):
            raise RuntimeError("the ranks of vLLM took different weights")
        self._llm.reset_prefix_cache()
        self.version = version
        return fingerprint(first["digests"])

    def sleep(self) -> None:
        """Gives device memory back, weights included, until the next `load`; not if the option
        `enable_sleep_mode` is false.
        """
        if not self._sleeps and self._may_sleep:
            self._llm.sleep(level=2)
            self._sleeps = True

    def close(self) -> None:
        """Ends the processes that vLLM started and gives its memory back."""
        if not self._is_open:
            return
        self._is_open = False
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin(self) -> None:
        if self._is_updating:  # the one before was cut: vLLM waits for its end
            self._step(END)
        self._step(BEGIN)
        self._is_updating = True

    def _step(self, step: str, **given: Any) -> None:
        """A step of an update, on all ranks."""
        self._llm.collective_rpc(method_of(vllm.__version__, step), kwargs=given)

    def _asked(self, params: SamplingParams, number: int) -> vllm.SamplingParams:
        """What vLLM is asked for one answer of a prompt."""
        truncation = {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
        return vllm.SamplingParams(
            temperature=params.temperature,
            # The most likely token is drawn from the model's own distribution.
            **(truncation if params.temperature else {}),
            max_tokens=params.max_tokens,
            stop=list(params.stop),
            stop_token_ids=list(dict.fromkeys([*self._codec.stop_ids, *params.stop_ids])),
            seed=request_seed(params, number),
            logprobs=0,
            ignore_eos=True,
            detokenize=bool(params.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: CompletionOutput) -> Completion:
        ids = list(output.token_ids)
        if output.finish_reason not in REASONS or output.logprobs is None or len(output.logprobs) != len(ids):
            raise RuntimeError(
                f"vLLM ended an answer with {output.finish_reason!r}, {len(ids)} tokens and {len(output.logprobs or ())} logprobs"
            )
        logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
        if not all(math.isfinite(logprob) for logprob in logprobs):
            raise RuntimeError(f"vLLM's logprobs are not finite: {logprobs[:8]}; look at the last updates")
        return Completion(ids, logprobs, REASONS[output.finish_reason], self.version)


def _in_parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    part: list[tuple[str, Tensor]] = []
    room = _PART_BYTES
    for name, tensor in tensors:
        if part and tensor.nbytes > room:
            yield part
            part, room = [], _PART_BYTES
        part.append((name, tensor.detach()))
        room -= tensor.nbytes
    if part:
        yield part


def _written(part: Sequence[tuple[str, Tensor]], path: Path) -> dict[str, Any]:
    """The tensors end to end in a file, and what the worker needs to take them from there."""
    infos = [
        TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in part
    ]
    make_file(path, num_bytes_of(infos))
    content = map_file(path, num_bytes_of(infos), for_writing=True)
    start = 0
    for _, tensor in part:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        content[start : start + len(flat)].copy_(flat)
        start += len(flat)
    return {
        "via": "shm",
        "tensors": [(info.name, list(info.shape), info.dtype) for info in infos],
        "where": {"path": str(path)},
    }
