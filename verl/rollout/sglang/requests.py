"""Bodies of requests to SGLang, and what the server says about itself."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl.rollout.inference_server import RefusedError
from verl.rollout.sglang.worker import LOADER
from verl.utils.sampling_types import SamplingParams

OLDEST = "0.5.17"
_NEEDED_PATHS = (
    "/generate",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/update_weights_from_tensor",
)


@dataclass(frozen=True)
class ServerInfo:
    """Properties of a running server.

    Attributes:
        num_ranks: tensor-parallel ranks.
        has_loader: it loads weights through `verl.rollout.sglang.worker.load`.
        has_update_sessions: it has calls for begin and end of a weight update.
        is_deterministic: the random numbers of a token follow from seed and position alone.
        max_kept_tokens: most tokens that a truncated distribution may keep, to have logprobs.
    """

    num_ranks: int
    has_loader: bool
    has_update_sessions: bool
    is_deterministic: bool
    max_kept_tokens: int


def parse_server_info(info: Any, paths: Mapping[str, Any], *, engine: str) -> ServerInfo:
    """Parse the server's description of itself.

    Args:
        info: response of /server_info.
        paths: endpoints of the server.
        engine: name, for messages.

    Raises:
        ValueError: the server is too old, or was started with parallelism that is not supported.
    """
    missing = [path for path in _NEEDED_PATHS if path not in paths]
    if missing or "sampling_mask_max_tokens" not in info:
        version = info["version"] if isinstance(info, dict) and "version" in info else "unknown"
        lacking = ", ".join(missing) or "sampling masks"
        raise ValueError(
            f"need SGLang {OLDEST} or newer for engine {engine}, got {version}, without {lacking}"
        )
    if info["dp_size"] != 1 or info["pp_size"] != 1:
        raise ValueError(
            "need dp_size 1 and pp_size 1 of SGLang, as each replica is a server of its own: set"
            " rollout.servers"
        )
    return ServerInfo(
        num_ranks=info["tp_size"],
        has_loader=LOADER in info["custom_weight_loader"],
        has_update_sessions="/begin_weight_update" in paths,
        is_deterministic=bool(info["enable_deterministic_inference"]),
        max_kept_tokens=info["sampling_mask_max_tokens"],
    )


def request_body(
    prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, vocab_size: int, info: ServerInfo
) -> dict[str, Any]:
    """Body of a streamed request for one answer.

    Raises:
        RefusedError: SGLang cannot answer it, or not with the logprobs of the sampled distribution.
    """
    if not all(0 <= token < vocab_size for token in prompt_ids) or not prompt_ids:
        # SGLang would not refuse these ids, but crash.
        raise RefusedError(
            f"need prompt ids from 0 up to {vocab_size - 1}, at least one; got {list(prompt_ids)[:20]}"
        )
    if params.repetition_penalty != 1:
        raise RefusedError(
            f"need repetition_penalty 1 for SGLang, whose penalty leaves the prompt out, got"
            f" {params.repetition_penalty}; take another engine"
        )
    # At temperature 0 the most likely token is drawn from the model's own distribution.
    truncates = params.truncates and params.temperature > 0
    sampling = {
        "temperature": params.temperature,
        "top_p": params.top_p if truncates else 1.0,
        "top_k": checked_top_k(params, vocab_size=vocab_size, info=info) if truncates else -1,
        "min_p": params.min_p if truncates else 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_new_tokens": params.max_tokens,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_ids),
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "sampling_seed": seed,
    }
    return {
        "rid": uuid.uuid4().hex,
        "input_ids": list(prompt_ids),
        "sampling_params": sampling,
        "stream": True,
        "return_logprob": True,
        # SGLang's usual logprobs are those before truncation; with the mask come those after it.
        "return_sampling_mask": truncates,
    }


def checked_top_k(params: SamplingParams, *, vocab_size: int, info: ServerInfo) -> int:
    """Number of tokens that a truncation may keep, which SGLang needs for the logprobs.

    Raises:
        RefusedError: it is too large, or min_p is used where sampling is deterministic.
    """
    top_k = min(params.top_k or vocab_size, vocab_size)
    if top_k > info.max_kept_tokens:
        truncation = f"top_k={params.top_k}, top_p={params.top_p}, min_p={params.min_p} of {vocab_size}"
        raise RefusedError(
            "SGLang gives the logprobs of a truncated distribution for at most"
            f" {info.max_kept_tokens} tokens, got {truncation}; set sampling.top_k to at most"
            f" {info.max_kept_tokens}, or engine_options.sampling_mask_max_tokens to {top_k}"
        )
    if params.min_p > 0 and info.is_deterministic:
        raise RefusedError(
            "SGLang cannot sample with min_p and with seeds; set sampling.min_p to 0 or leave"
            " enable_deterministic_inference out"
        )
    return top_k
