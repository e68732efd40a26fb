"""Counts of a judge's calls, and the limit on their number and cost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from verl.rewards.failures import FatalRewardError
from verl.rewards.judge.judge_options import JudgeOptions

_PER_PRICE = 1e6
# Tokens that a chat template adds to a message, at most.
_MESSAGE_TOKENS = 64


@dataclass
class Tally:
    """Counts of some calls.

    Attributes:
        calls: requests sent, retries among them.
        cache_hits: questions answered without a request.
        retries: requests that followed one without a verdict.
        failures: questions without a verdict at the end.
        parse_failures: replies without a verdict that could be read.
        input_tokens, output_tokens: as the server counts them.
        cost: in the unit of the prices.
    """

    calls: int = 0
    cache_hits: int = 0
    retries: int = 0
    failures: int = 0
    parse_failures: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def add(self, other: Tally) -> None:
        """Add the counts of other calls."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def metrics(self) -> dict[str, float]:
        """Name -> value."""
        return {each.name: float(getattr(self, each.name)) for each in fields(self)}


class Budget:
    """The calls and the cost that are left; a request is sent only if it cannot exceed them.

    The cost of a request is known when it is answered. Until then the most that it can cost is kept back: a
    token for each byte of the question, and the longest reply.

    Args:
        options: limits and prices.

    Attributes:
        total: counts since the start.
    """

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self.total = Tally()
        self._kept_back, self._num_open = 0.0, 0
        self._settled = asyncio.Condition()

    def worst_cost(self, body: Mapping[str, Any]) -> float:
        """The most that a request can cost."""
        texts = [str(message["content"]) for message in body["messages"]]
        num_in = sum(len(text.encode()) + _MESSAGE_TOKENS for text in texts)
        return self.cost(num_in, self._options.longest_reply or 0)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Cost of tokens by the prices."""
        o = self._options
        return (input_tokens * o.input_price + output_tokens * o.output_price) / _PER_PRICE

    async def reserve(self, worst: float) -> None:
        """Count a request before it is sent; waits while others may still leave enough.

        Raises:
            FatalRewardError: a limit is reached.
        """
        o, total = self._options, self.total
        async with self._settled:
            while True:
                if o.max_calls is not None and total.calls >= o.max_calls:
                    raise FatalRewardError(
                        f"the judge has made {total.calls} calls, the limit of max_calls; raise it to go on "
                        "from the newest checkpoint (replies in the cache are not asked for again)"
                    )
                if o.max_cost is not None and total.cost + worst > o.max_cost:
                    raise FatalRewardError(
                        f"the judge has cost {total.cost:.6g}, and the next call can cost {worst:.2g} more, "
                        f"which may exceed max_cost {o.max_cost:g}; raise it to go on from the newest "
                        "checkpoint (replies in the cache are not asked for again)"
                    )
                if o.max_cost is None or total.cost + self._kept_back + worst <= o.max_cost:
                    break
                await self._settled.wait()
            total.calls += 1
            self._num_open += 1
            self._kept_back += worst

    async def settle(self, worst: float, spent: Tally) -> None:
        """Replace what was kept back by the counts of the answered request, without `calls`."""
        async with self._settled:
            self._num_open -= 1
            # Exactly 0 without open requests: what rounding leaves could make the next one wait for ever.
            self._kept_back = self._kept_back - worst if self._num_open else 0.0
            self.total.add(spent)
            self._settled.notify_all()
