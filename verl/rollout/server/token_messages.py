"""Message format of the token stream between a trainer and its server, over one WebSocket.

To the server, JSON objects:
    ask: list of [number of the first answer on this connection, body of a completion request]. The answers to
        a request have consecutive numbers.
    drop: numbers of answers to abort.

From the server, bytes, all little-endian: the length of a JSON object as uint32, the object, the new token
ids as int64, then their logprobs as float64. The object has:
    tokens: list of [number of the answer, weight version, number of ids, finish reason or null, number of
        prompt tokens that were not computed].
    failed: list of [numbers of answers, true if the server refuses them for good, message].
An empty object is a heartbeat. Numbers travel as bytes, since thousands of them in JSON would keep the
trainer's Python interpreter busy.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.rollout.embedded.async_generator import Token

PATH = "/control/answers"
MAX_MESSAGE_BYTES = 2**26


@dataclass(frozen=True)
class Failure:
    """Answers that will get no more tokens.

    Attributes:
        answers: their numbers on the connection.
        is_refusal: any other server would refuse them, too.
        message: for the user.
    """

    answers: Sequence[int]
    is_refusal: bool
    message: str


def pack_message(runs: Sequence[tuple[int, Sequence[Token]]], failures: Sequence[Failure]) -> bytes:
    """Pack a message of the server.

    Args:
        runs: number of an answer, and new tokens of it that have one version.
        failures: answers that failed.
    """
    counts = [
        (answer, run[-1].version, len(run), run[-1].finish_reason, run[-1].num_reused) for answer, run in runs
    ]
    failed = [(failure.answers, failure.is_refusal, failure.message) for failure in failures]
    fields = {"tokens": counts, "failed": failed}
    head = dump_json({name: entries for name, entries in fields.items() if entries}).encode()
    tokens = [token for _, run in runs for token in run]
    ids, logprobs = [token.token_id for token in tokens], [token.logprob for token in tokens]
    numbers = struct.pack(f"<{len(tokens)}q{len(tokens)}d", *ids, *logprobs)
    return struct.pack("<I", len(head)) + head + numbers


def unpack_message(content: bytes) -> tuple[dict[str, Any], tuple[int, ...], tuple[float, ...]]:
    """Unpack a message of the server into its JSON object, token ids and logprobs."""
    (length,) = struct.unpack_from("<I", content)
    start = 4 + length
    count = (len(content) - start) // 16
    numbers = struct.unpack_from(f"<{count}q{count}d", content, start)
    return json.loads(content[4:start]), numbers[:count], numbers[count:]


def dump_json(message: dict[str, Any]) -> str:
    """Encode an object as JSON without spaces."""
    return json.dumps(message, separators=(",", ":"))
