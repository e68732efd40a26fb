"""Settings of generation: sampling parameters, and the engine that answers prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from verl.config.fields import Options, PathText, Section, setting


class SamplingConfig(Section):
    """Sampling parameters of the answers."""

    temperature: float = setting(1.0, "Logits are divided by it; 0: the most likely token.", ge=0)
    top_p: float = setting(
        1.0, "The smallest set of tokens with this probability is kept.", source="1904.09751", gt=0, le=1
    )
    top_k: int = setting(0, "Tokens kept; 0: all.", unit="tokens", ge=0)
    min_p: float = setting(
        0.0,
        "Tokens below this share of the largest probability are dropped.",
        source="2407.01082",
        ge=0,
        le=1,
    )
    repetition_penalty: float = setting(
        1.0,
        "Logits of tokens that prompt or answer already have are divided by it if positive, else multiplied.",
        source="CTRL, 1909.05858, 4.1",
        gt=0,
    )
    max_tokens: int = setting(128, "Longest answer.", unit="tokens", ge=1)
    stop: tuple[str, ...] = setting((), "Texts that end an answer.")
    stop_ids: tuple[int, ...] = setting((), "Token ids that end an answer, besides the tokenizer's own.")

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError(
                "need texts that end an answer, got an empty one, which ends each before it begins"
            )
        return stop


class RolloutConfig(Section):
    """The engines that answer prompts."""

    engine: str = setting(
        "embedded",
        "embedded: the policy itself; vllm; sglang; served: servers of the embedded engine (verl serve); "
        "http: any OpenAI-compatible server, which keeps its own weights; "
        'or "package.module:Class".',
        source="HybridFlow, 2409.19256, 6",
    )
    servers: int = setting(
        0,
        "Servers that the run starts on this machine; 0 and no addresses: the engine is in the policy's "
        "processes.",
        ge=0,
    )
    addresses: tuple[str, ...] = setting((), "Servers that are already running, http://HOST:PORT.")
    engine_options: Options = setting(
        Options(), "Options of the engine, passed on unchanged, such as tensor_parallel_size."
    )
    python: PathText | None = setting(
        None,
        "Python interpreter of the engine's environment, for servers that the run starts; none: this one.",
    )
    secret_env: str = setting(
        "VERL_SERVER_SECRET", "Environment variable with the secret of the servers in rollout.addresses."
    )
    weights_via: Literal["auto", "shm", "group", "disk", "direct", "ipc"] = setting(
        "auto",
        "Transport of the weights to servers. Gathered weights: shm (shared memory), group (process group) "
        "or disk (files). direct: each rank of the policy sends its shards. ipc: servers read them from the "
        "policy's GPU. auto: shm where it reaches a server, else group.",
    )
    on_update: Literal["keep", "recompute", "abort"] = setting(
        "keep",
        "Running requests when new weights arrive. keep: the server continues them. recompute: they are sent "
        "again with their tokens, so that the new weights compute their KV cache. abort: they start again.",
        source="AReaL, 2505.24298, 4.1",
    )
    max_slots: int = setting(
        256,
        "Answers generated at the same time by the embedded engine, or by each server.",
        unit="answers",
        ge=1,
    )
    prefix_tokens: int | None = setting(
        None,
        "Tokens of earlier turns of episodes whose keys and values each embedded engine keeps, so that the "
        "next turn continues from them; none: as many as max_slots answers have at most, 0: none.",
        unit="tokens",
        ge=0,
    )
    timeout_s: float = setting(
        60.0, "Time without a sign of life after which a server counts as hung.", unit="s", gt=0
    )
    servers_sleep: bool = setting(
        False,
        "Servers release their device memory while the policy is trained, if they share devices with it; "
        "vllm and sglang.",
    )
    mismatch_warn: float = setting(
        0.01,
        "KL between sampler and trainer per token above which a step warns.",
        unit="nats",
        source="prime-rl",
        gt=0,
    )
    mismatch_stop: float | None = setting(
        None,
        "KL between sampler and trainer per token above which the run stops; none: never.",
        unit="nats",
        gt=0,
    )

    @property
    def has_servers(self) -> bool:
        """True if servers answer the prompts, and not the processes of the policy."""
        return bool(self.servers or self.addresses)
