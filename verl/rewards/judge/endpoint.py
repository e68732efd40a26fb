"""Questions to a chat endpoint: a bound on requests at a time, retries, the cache, and costs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientConnectorError

from verl.rewards.failures import FatalRewardError, RewardFailure
from verl.rewards.judge.judge_options import JudgeOptions
from verl.rewards.judge.reply_cache import ReplyCache, key_of
from verl.rewards.judge.spending import Budget, Tally
from verl.rewards.judge.verdicts import ReadVerdict, UnreadableReplyError, reply_of
from verl.rollout.http_client import HTTPClient, HTTPStatusError, NoResponseError
from verl.rollout.inference_server import EngineError
from verl.rollout.server_process import cause_of
from verl.utils.network import is_loopback

_MAX_BACKOFF_S = 60.0
# A server that asks for more than this is out of quota.
_MAX_RETRY_AFTER_S = 600.0
# Wrong key, no credit, no access, no such model or path: no later request could succeed.
_FATAL_STATUS = {
    401: "correct the key in the environment variable of api_key_env",
    402: "there is no credit left for this key",
    403: "this key has no access to the model",
    404: "correct `address` and `model`",
}
# So many questions in a row without an answer, per request at a time, and the server is down.
_MAX_FAILED_ROUNDS = 2


@dataclass(frozen=True)
class Question:
    """One question to a judge.

    Attributes:
        system: instructions of the judge.
        text: the question.
        format: the form of the verdict, said once more after a reply without one.
        extra: further fields of the request.
        sample: number of the reply among several to the same question.
    """

    system: str
    text: str
    format: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0


@dataclass(frozen=True)
class Verdict:
    """A verdict and the text that it was read from.

    Attributes:
        value: of the function that read it.
        text: the judge's reply.
    """

    value: Any
    text: str


class JudgeEndpoint:
    """The judge's model behind a chat endpoint; all coroutines run in one event loop.

    Args:
        options: limits, retries and fields of requests.
        address: base URL.
        model: name in requests.
        identity: of the model, for the cache.
        api_key: sent with each request; "": none.
        cache: keeps responses; None: none are kept.
        check: raises `EngineError` if the process of the server has ended; None: it is not ours.
        sleep: pauses between retries.

    Attributes:
        budget: counts and limits.
    """

    def __init__(
        self,
        options: JudgeOptions,
        *,
        address: str,
        model: str,
        identity: str,
        api_key: str = "",
        cache: ReplyCache | None = None,
        check: Callable[[], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._options, self._model, self._identity = options, model, identity
        self._cache, self._check, self._sleep = cache, check, sleep
        base = address.rstrip("/")
        base = base if urlsplit(base).path else f"{base}/v1"
        # A proxy is for servers elsewhere; on this machine it would only get to know the key.
        self._client = HTTPClient(
            f"judge {model}", base, api_key=api_key, use_proxy=not is_loopback(urlsplit(base).hostname or "")
        )
        self._slots = asyncio.Semaphore(options.concurrency)
        self._running: dict[str, asyncio.Task[Verdict | RewardFailure]] = {}
        self._failed_in_a_row = 0
        self._fatal: FatalRewardError | None = None
        self.budget = Budget(options)

    async def close(self) -> None:
        """Close all connections."""
        for task in self._running.values():
            task.cancel()
        await self._client.close()

    async def ask(self, question: Question, read: ReadVerdict, tally: Tally) -> Verdict | RewardFailure:
        """The verdict on a question, or the reason why there is none after all retries.

        The same question at the same time is asked once.

        Args:
            question: the question.
            read: reads the verdict from a reply.
            tally: the counts of this question are added to it.

        Raises:
            FatalRewardError: a limit is reached, or no later question could be answered.
        """
        key = key_of({"judge": self._identity, "sample": question.sample, **self._body(question)})
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.ensure_future(self._answer(key, question, read, tally))
            task.add_done_callback(lambda _: self._running.pop(key, None))
        else:
            tally.cache_hits += 1
        # An interrupt of one who waits is not one of the others.
        return await asyncio.shield(task)

    async def probe(self, question: Question) -> Verdict | RewardFailure:
        """The reply to a question, whatever its verdict, past the cache.

        Raises:
            FatalRewardError: no question could be answered.
        """
        return await self._ask_until_answered(None, question, lambda reply: reply, Tally())

    def _body(self, question: Question, reminder: str = "") -> dict[str, Any]:
        o = self._options
        first = [] if o.system_role else [question.system]
        text = "\n\n".join(filter(None, [*first, question.text, question.format, reminder]))
        messages = [{"role": "system", "content": question.system}] if o.system_role else []
        messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {"model": self._model, "messages": messages}
        if o.prefill:
            messages.append({"role": "assistant", "content": o.prefill})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        body |= {} if o.max_tokens is None else {"max_tokens": o.max_tokens}
        body |= {} if o.temperature is None else {"temperature": o.temperature}
        return {**body, **question.extra, **o.extra}

    async def _answer(
        self, key: str, question: Question, read: ReadVerdict, tally: Tally
    ) -> Verdict | RewardFailure:
        if self._cache is not None:
            found = await asyncio.to_thread(self._cache.get, key)
            if found is not None and (kept := self._verdict_of(found, read)) is not None:
                tally.cache_hits += 1
                return kept
        async with self._slots:
            verdict = await self._ask_until_answered(key, question, read, tally)
        if isinstance(verdict, RewardFailure):
            tally.failures += 1
        return verdict

    async def _ask_until_answered(
        self, key: str | None, question: Question, read: ReadVerdict, tally: Tally
    ) -> Verdict | RewardFailure:
        body = self._body(question)
        for attempt in range(self._options.retries + 1):
            tally.retries += attempt > 0
            try:
                response = await self._post(body, tally)
                reply = reply_of(response, prefill=self._options.prefill)
                verdict = Verdict(read(reply), reply.text)
            except UnreadableReplyError as error:
                tally.parse_failures += 1
                failure = RewardFailure("judge_unreadable", str(error))
                body = self._body(question, f"A reply without this has no effect. {question.format}")
                continue
            except EngineError as error:
                failure, pause_s = await self._failure(error, attempt)
                if pause_s is None:
                    break
                await self._sleep(pause_s)
                continue
            if self._cache is not None and key is not None:
                await asyncio.to_thread(self._cache.put, key, response)
            return verdict
        self._count_failure(failure)
        return failure

    async def _post(self, body: dict[str, Any], tally: Tally) -> dict[str, Any]:
        """Send one request, within the budget."""
        if self._fatal is not None:
            raise self._fatal
        worst = self.budget.worst_cost(body)
        try:
            await self.budget.reserve(worst)
        except FatalRewardError as error:
            self._fatal = error
            raise
        # Until the response says what it has cost: a request without one may have been answered, too.
        spent = Tally(cost=worst)
        try:
            response = await self._client.json(
                "POST", "/chat/completions", body, timeout_s=self._options.timeout_s
            )
            spent = self._spent(response, worst)
            self._failed_in_a_row = 0  # whatever it answers, the server is there
        except EngineError as error:
            if isinstance(error, HTTPStatusError) or isinstance(error.__cause__, ClientConnectorError):
                spent = Tally()
            raise
        finally:
            await self.budget.settle(worst, spent)
            tally.add(spent)
            tally.calls += 1
        return response

    def _spent(self, response: Mapping[str, Any], worst: float) -> Tally:
        usage = response.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        num_in, num_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(num_in, int) and isinstance(num_out, int)):
            return Tally(cost=worst)  # A server that does not count.
        return Tally(input_tokens=num_in, output_tokens=num_out, cost=self.budget.cost(num_in, num_out))

    async def _failure(self, error: EngineError, attempt: int) -> tuple[RewardFailure, float | None]:
        """A failed request as an outcome, and the pause before the next; None: there is none.

        Raises:
            FatalRewardError: no later request could succeed.
        """
        if self._check is not None and (cause := await cause_of(error, self._check)) is not error:
            self._fatal = FatalRewardError(str(cause))
        retry_after_s = 0.0
        failure = RewardFailure("judge_unavailable", str(error))
        if isinstance(error, HTTPStatusError):
            if error.status in _FATAL_STATUS:
                self._fatal = FatalRewardError(f"{error}; {_FATAL_STATUS[error.status]}")
            elif error.is_permanent:
                self._failed_in_a_row = 0
                return RewardFailure("judge_refused", str(error)), None
            retry_after_s = error.retry_after_s or 0.0
        elif isinstance(error, NoResponseError):
            failure = RewardFailure("judge_timeout", f"{error}, {self._options.timeout_s:g} s (timeout_s)")
        if self._fatal is not None:
            raise self._fatal from error
        if retry_after_s > _MAX_RETRY_AFTER_S:
            said = f"{error}; it asks to wait {retry_after_s:.0f} s"
            return RewardFailure("judge_unavailable", said), None
        if attempt == self._options.retries:
            return failure, None
        backoff_s = min(_MAX_BACKOFF_S, self._options.backoff_s * 2**attempt)
        # Randomized, so that requests that failed together are not sent again together.
        return failure, max(retry_after_s, backoff_s * random.uniform(0.5, 1.0))

    def _verdict_of(self, response: Mapping[str, Any], read: ReadVerdict) -> Verdict | None:
        """The verdict in a kept response; None if it cannot be read (any more)."""
        try:
            reply = reply_of(response, prefill=self._options.prefill)
            return Verdict(read(reply), reply.text)
        except UnreadableReplyError:
            return None

    def _count_failure(self, failure: RewardFailure) -> None:
        """Give up a server that answers nobody, since each question takes the time of all retries."""
        if failure.outcome not in ("judge_unavailable", "judge_timeout"):
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _MAX_FAILED_ROUNDS * self._options.concurrency:
            self._fatal = FatalRewardError(
                f"the judge has answered none of the last {self._failed_in_a_row} questions, with "
                f"{self._options.retries} retries each; the last: {failure.detail}; start the run again when "
                "it is back, which goes on from the newest checkpoint, or raise retries or timeout_s"
            )
            raise self._fatal
