"""Options of the judges: the endpoint, the question, the limits and the costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError, model_validator

from verl.config.fields import PathText, Section, setting
from verl.config.layers import nearest_key
from verl.engines.hf.models import Precision

Options = TypeVar("Options", bound="JudgeOptions")


class JudgeOptions(Section):
    """Options that all judges share."""

    address: str | None = setting(None, "Base URL of a server with OpenAI's chat API, with or without /v1.")
    path: str | None = setting(None, "Folder or hub name of a model that the run itself serves as the judge.")
    model: str | None = setting(None, "Name of the model in requests to `address`.")
    api_key_env: str | None = setting(None, "Name of the environment variable with the API key.")
    precision: Precision = setting("fp32", "Arithmetic of the model of `path`.")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Device of the model of `path`.")
    rubric: str = setting("", "What a good answer is: a text, or a file with it.")
    template: str = setting(
        "", "Jinja template of the question, a text or a file, in place of the built-in one."
    )
    system_role: bool = setting(
        True, "Send the instructions as a system message; else in front of the question."
    )
    prefill: str = setting(
        "",
        "Beginning of the reply, which the server continues, so that a small model keeps to the form. Needs "
        "a server that knows `continue_final_message`, such as vLLM or `verl serve`.",
    )
    max_tokens: int | None = setting(512, "Longest reply; null: the field is not sent.", unit="tokens", ge=1)
    temperature: float | None = setting(0.0, "Of the judge; null: the field is not sent.", ge=0)
    samples: int = setting(1, "Replies to each question, which are averaged.", ge=1)
    extra: dict[str, Any] = setting({}, "Further fields of the request.")
    concurrency: int = setting(16, "Most requests at a time, over the whole run.", ge=1)
    timeout_s: float = setting(60.0, "Time limit of one request.", unit="s", gt=0)
    retries: int = setting(4, "Further requests after one that failed or gave no verdict.", ge=0)
    backoff_s: float = setting(1.0, "Pause before the first retry, doubled for each.", unit="s", ge=0)
    max_calls: int | None = setting(None, "Requests after which the run stops.", ge=1)
    max_cost: float | None = setting(None, "Cost that the run stops before, in the unit of prices.", gt=0)
    input_price: float = setting(0.0, "Price of a million tokens of questions.", ge=0)
    output_price: float = setting(0.0, "Price of a million tokens of replies.", ge=0)
    cache: PathText = setting("run", "File with replies; run: in the run's folder; off: none.")

    @model_validator(mode="after")
    def check_options(self) -> JudgeOptions:
        """Check options against each other; ValueError if they contradict."""
        if (self.address is None) == (self.path is None):
            raise ValueError(
                "need either `address`, the URL of a server with OpenAI's chat API, or `path`, a model that "
                "the run serves itself"
            )
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise ValueError(f"need an address that begins with http:// or https://, got {self.address!r}")
        if self.address is not None and not self.model:
            raise ValueError("need `model`, the name of the model in requests, beside `address`")
        if self.path is not None and (self.model or self.api_key_env):
            raise ValueError("need `model` and `api_key_env` beside `address` alone; leave them out")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"need a temperature above 0 for {self.samples} samples, which would all be equal; set "
                "temperature, or samples 1"
            )
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("need input_price or output_price, per million tokens, beside max_cost")
        if self.max_cost is not None and self.longest_reply is None:
            raise ValueError(
                "need max_tokens, or extra.max_completion_tokens, beside max_cost: the cost of a reply of "
                "any length has no bound"
            )
        return self

    @property
    def longest_reply(self) -> int | None:
        """Most tokens of a reply; None if there is no limit."""
        limit = self.extra.get("max_completion_tokens", self.extra.get("max_tokens", self.max_tokens))
        return limit if isinstance(limit, int) else None


class ScoreOptions(JudgeOptions):
    """Options of `judge`."""

    scale: tuple[float, float] = setting((1.0, 10.0), "Worst and best score; the reward is from 0 to 1.")
    threshold: float | None = setting(None, "Lowest score of a right answer, for `accuracy`.")
    logprobs: bool = setting(
        False,
        "Weigh the scores by their probabilities; needs a scale of one digit.",
        source="G-Eval, arXiv 2303.16634",
    )

    @model_validator(mode="after")
    def check_scale(self) -> ScoreOptions:
        """Check the scale; ValueError if it is empty, or if scores on it are no single tokens."""
        low, high = self.scale
        if not low < high:
            raise ValueError(
                f"need a scale from the worst to the best score, such as [1, 10], got {self.scale}"
            )
        if self.threshold is not None and not low <= self.threshold <= high:
            raise ValueError(
                f"need a threshold on the scale from {low:g} to {high:g}, got {self.threshold:g}"
            )
        if self.logprobs and not (low >= 0 and high <= 9):
            raise ValueError(
                f"need a scale of one digit for logprobs, such as [1, 5] or [0, 9], so that a score is one "
                f"token, got {list(self.scale)}"
            )
        return self


class PairwiseOptions(JudgeOptions):
    """Options of `judge_pairwise`."""

    against: Literal["siblings", "reference"] = setting("siblings", "Opponents of an answer.")
    opponents: int | None = setting(
        2, "Pairs per answer of a group: n answers make n times as many pairs; null: all pairs.", ge=1
    )
    both_orders: bool = setting(
        True,
        "Ask for each pair twice, with the answers exchanged, so that their order has no effect.",
        source="arXiv 2306.05685",
    )


class RankingOptions(JudgeOptions):
    """Options of `judge_ranking`."""

    max_tokens: int | None = setting(2048, "Longest reply; null: the field is not sent.", unit="tokens", ge=1)
    max_group: int = setting(
        16, "Most answers in one question; larger groups are split, with two answers in each part.", ge=4
    )


def options_of(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Options of a judge from those in the settings.

    Raises:
        ValueError: an unknown one, with the nearest valid one, or one that is wrong.
    """
    for name in given:
        if name not in kind.model_fields:
            near = nearest_key(name, list(kind.model_fields))
            raise ValueError(f"there is no option {name!r}; the nearest is {near}")
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        problems = [".".join(map(str, e["loc"])) + ": " * bool(e["loc"]) + e["msg"] for e in error.errors()]
        raise ValueError("; ".join(p.replace("Value error, ", "") for p in problems)) from None


def text_or_file(text: str, *, name: str) -> str:
    """The text, or the content of the file that it names: a single line without spaces that ends in a suffix.

    Raises:
        ValueError: it names a file that cannot be read.
    """
    looks_like_file = "\n" not in text and Path(text).suffix in (".txt", ".md", ".jinja", ".j2")
    if not looks_like_file:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"need a file or a text as {name}, {text!r} cannot be read: {error}") from error
