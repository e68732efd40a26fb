"""Settings of generation: sampling parameters, and the engine that answers prompts."""

from __future__ import annotations

from typing import Literal

from verl.config.fields import Options, Section, setting


class SamplingConfig(Section):
    """How answers are drawn."""

    temperature: float = setting(1.0, "Logits are divided by it; 0: the most likely token.", ge=0)
    top_p: float = setting(
        1.0, "Smallest set of tokens with this mass is kept.", source="1904.09751", gt=0, le=1
    )
    top_k: int = setting(0, "Tokens kept; 0: all.", unit="tokens", ge=0)
    min_p: float = setting(
        0.0,
        "Tokens below this share of the largest probability are dropped.",
        source="2407.01082",
        ge=0,
        le=1,
    )
    max_tokens: int = setting(128, "Longest answer.", unit="tokens", ge=1)
    stop: tuple[str, ...] = setting((), "Texts that end an answer.")
    stop_ids: tuple[int, ...] = setting((), "Token ids that end an answer, besides the tokenizer's own.")


class RolloutConfig(Section):
    """The engines that answer prompts."""

    engine: str = setting(
        "embedded",
        "embedded: the policy itself; vllm, sglang; served: servers of the embedded engine (verl serve); http: any OpenAI-compatible server, "
        'whose weights are its own; or "package.module:Class".',
        source="HybridFlow, 2409.19256, 6",
    )
    servers: int = setting(
        0,
        "Servers that the run starts on this machine; 0 without addresses: the engine is in the policy's processes.",
        ge=0,
    )
    addresses: tuple[str, ...] = setting((), "Servers that run already, http://HOST:PORT.")
    engine_options: Options = setting(
        Options(), "What the engine itself offers, passed on as it is, such as tensor_parallel_size."
    )
    python: str | None = setting(
        None,
        "Interpreter of the environment that has the engine, for servers that the run starts; none: this one.",
    )
    secret_env: str = setting(
        "VERL_SERVER_SECRET", "Environment variable with the secret of the servers in rollout.addresses."
    )
    weights_via: Literal["auto", "shm", "group", "disk", "direct", "ipc"] = setting(
        "auto",
        "How weights travel to servers: gathered, into shared memory, over a process group or in files; direct: each rank of the policy sends "
        "its part; ipc: servers read them from the policy's GPU; auto: shm where it reaches a server, else group.",
    )
    on_update: Literal["keep", "recompute", "abort"] = setting(
        "keep",
        "Requests that run when new weights come: kept by the server, to go on with them; recompute: cut, and asked again with their tokens, "
        "so that the new weights compute their cache; or aborted, to begin anew.",
        source="AReaL, 2505.24298, 4.1",
    )
    max_slots: int = setting(
        256,
        "Answers generated at the same time by the embedded engine, or by each server.",
        unit="answers",
        ge=1,
    )
    timeout_s: float = setting(60.0, "Silence of a server after which it counts as hung.", unit="s", gt=0)
    servers_sleep: bool = setting(
        False,
        "Servers give their device memory back while the policy learns: for those that share devices with it; vllm and sglang.",
    )
    mismatch_warn: float = setting(
        0.01,
        "KL of sampler and trainer per token above which a step warns.",
        unit="nats",
        source="prime-rl",
        gt=0,
    )
    mismatch_stop: float | None = setting(
        None, "The same, above which the run stops; none: it never does.", unit="nats", gt=0
    )
