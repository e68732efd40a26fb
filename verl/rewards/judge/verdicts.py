"""Verdicts in the replies of a judge: read strictly, and refused where there is none or more than one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Winner = Literal["a", "b", "tie"]
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_LABELLED = re.compile(
    rf"\b(?:score|rating)\b[\"'*_\s]*[:=][\"'*_\s]*({_NUMBER})(?:\s*(?:/|out\s+of)\s*({_NUMBER}))?",
    re.IGNORECASE,
)
_LABELLED_WINNER = re.compile(r"\bwinner\b[\"'*_\s]*[:=][\"'*_\s]*\[*(A|B|C|tie)\b", re.IGNORECASE)
# As in MT-Bench: [[A]], [[B]], or [[C]] for a tie.
_BRACKETED_WINNER = re.compile(r"\[\[(A|B|C)\]\]")
_WINNERS: Mapping[str, Winner] = {"a": "a", "b": "b", "c": "tie", "tie": "tie"}
_SHOWN = 200
# Start and end of a JSON object in a text, and its value.
FoundObject = tuple[int, int, dict[str, Any]]


class UnreadableReplyError(ValueError):
    """A reply of a judge without a verdict that can be read."""


@dataclass(frozen=True)
class TokenChoice:
    """One token of a reply.

    Attributes:
        text: of the token.
        alternatives: logprob of each of the most likely tokens at its place, by text.
    """

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """A reply of a judge.

    Attributes:
        text: without the judge's own reasoning.
        cut: it ended at the limit of tokens.
        tokens: of the whole reply, with their alternatives, if they were asked for.
    """

    text: str
    cut: bool = False
    tokens: Sequence[TokenChoice] = field(default=())


def reply_of(response: Mapping[str, Any], *, prefill: str = "") -> Reply:
    """The reply in a chat completion.

    Args:
        response: of the server.
        prefill: beginning of the reply that the server has continued, without repeating it.

    Raises:
        UnreadableReplyError: there is no text in it; says why.
    """
    choices = response.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise UnreadableReplyError(f"the response has no choices: {json.dumps(response)[:_SHOWN]}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    text = without_reasoning(prefill + content) if isinstance(content, str) and content else ""
    cut = choice.get("finish_reason") == "length"
    if not text:
        reasoning = bool(content or message.get("reasoning_content") or message.get("reasoning"))
        raise UnreadableReplyError(_no_text(message, cut=cut, reasoning=reasoning))
    tokens = _token_choices(choice)
    return Reply(text, cut, (TokenChoice(prefill, {}), *tokens) if tokens and prefill else tokens)


def without_reasoning(text: str) -> str:
    """A reply without the thoughts of a reasoning model, stripped; "" if they never end."""
    # The opening mark may be in the prompt.
    visible = text.rpartition("</think>")[2]
    return visible.partition("<think>")[0].strip()


def score_in(reply: Reply, low: float, high: float, *, quotable: str = "") -> tuple[float, int]:
    """Score of a reply: JSON {"score": n} at its end, else all scores in it, if they agree.

    Scores are `{"score": n}` or labelled, such as "Score: 7/10"; any other number is none.

    Args:
        reply: of the judge.
        low, high: ends of the scale.
        quotable: the answer that was judged. A score that stands in it, too, may be a quote, and is none.

    Returns:
        The score, and where its number begins in the text.

    Raises:
        UnreadableReplyError: there is none, several differ, or it is not on the scale.
    """
    objects = list(json_objects(reply.text, "score"))
    found = own_objects(objects, "score", quotable)
    if found and _ends_reply(reply.text, found[-1][1]):
        found = found[-1:]
        labelled = []
    else:
        labelled = [m for m in _LABELLED.finditer(reply.text) if not _is_inside(m, objects)]
    scores = {_number_of(v["score"], high): _number_place(reply.text, start, end) for start, end, v in found}
    for match in labelled:
        if _plain(match[0]) in _plain(quotable):
            continue
        if reply.cut and match.end() == len(reply.text):
            raise UnreadableReplyError(f"the reply was cut in its score: {reply.text[-_SHOWN:]!r}")
        if match[2] is not None and float(match[2]) != high:
            raise UnreadableReplyError(f"the score {match[0]!r} is not on the scale to {high:g}")
        scores.setdefault(float(match[1]), match.start(1))
    if len(scores) > 1:
        raise UnreadableReplyError(f"the reply has several scores, {', '.join(f'{s:g}' for s in scores)}")
    for score, place in scores.items():
        return _on_scale(score, low, high), place
    raise UnreadableReplyError(f"the reply has no score{_why_none(reply)}: {reply.text[-_SHOWN:]!r}")


def expected_score(reply: Reply, place: int, low: float, high: float) -> float:
    """Mean of the scores that the judge could have given at a place of its reply, by their probabilities.

    G-Eval, https://arxiv.org/abs/2303.16634, section 2.3, over the tokens that the server lists.

    Raises:
        UnreadableReplyError: the reply has no logprobs, or the score is not one token.
    """
    if not reply.tokens:
        raise UnreadableReplyError("the response has no logprobs; set logprobs to false for this server")
    whole = "".join(token.text for token in reply.tokens)
    # The text may lack reasoning in front of it, and white space at its end.
    start = whole.rfind(reply.text) + place
    position = 0
    for token in reply.tokens:
        position += len(token.text)
        if position > start:
            break
    weights: dict[float, float] = {}
    for text, logprob in token.alternatives.items():
        digit = text.strip().strip('"')
        if digit.isdecimal() and low <= float(digit) <= high:
            weights[float(digit)] = weights.get(float(digit), 0.0) + math.exp(logprob)
    if whole.rfind(reply.text) < 0 or not weights:
        raise UnreadableReplyError("the score is not one token of the reply; set logprobs to false")
    return sum(score * weight for score, weight in weights.items()) / sum(weights.values())


def winner_in(reply: Reply, *, quotable: str = "") -> Winner:
    """Winner of a comparison: JSON {"winner": "A"} at the end of the reply, else all verdicts in it.

    Verdicts are that JSON, "Winner: A" and "[[A]]"; A, B, or tie ([[C]]). One that stands in the answers is
    none, as for `score_in`.

    Raises:
        UnreadableReplyError: there is none, or several differ.
    """
    objects = list(json_objects(reply.text, "winner"))
    found = own_objects(objects, "winner", quotable)
    names = [value["winner"] for _, _, value in found]
    if found and _ends_reply(reply.text, found[-1][1]):
        names = names[-1:]
    else:
        matches = [m for p in (_LABELLED_WINNER, _BRACKETED_WINNER) for m in p.finditer(reply.text)]
        names += [
            m[1] for m in matches if not _is_inside(m, objects) and _plain(m[0]) not in _plain(quotable)
        ]
    winners = {_WINNERS.get(str(name).strip().lower().removeprefix("response_")) for name in names}
    if len(winners) == 1 and (winner := winners.pop()) is not None:
        return winner
    if not names:
        raise UnreadableReplyError(f"the reply names no winner{_why_none(reply)}: {reply.text[-_SHOWN:]!r}")
    raise UnreadableReplyError(f"need one winner, A, B or tie, got {', '.join(map(str, names))}")


def ranking_in(reply: Reply, count: int, *, quotable: str = "") -> list[float]:
    """Scores of responses 1 to `count`, each in [0, 1], from JSON {"scores": ...}, the last in the reply.

    The value is a list of {"id": 1, "score": 0.5}, or a mapping of ids to scores. JSON that stands in the
    answers is none, as for `score_in`.

    Raises:
        UnreadableReplyError: an id is missing, there twice, or unknown, or a score is not in [0, 1].
    """
    found = own_objects(list(json_objects(reply.text, "scores")), "scores", quotable)
    if not found:
        raise UnreadableReplyError(f"the reply has no scores{_why_none(reply)}: {reply.text[-_SHOWN:]!r}")
    entries = found[-1][2]["scores"]
    if isinstance(entries, dict):
        entries = [{"id": name, "score": score} for name, score in entries.items()]
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UnreadableReplyError(f"need scores as a list of id and score, got {str(entries)[:_SHOWN]}")
    scores: dict[str, float] = {}
    for entry in entries:
        if not {"id", "score"} <= set(entry):
            raise UnreadableReplyError(f"need an id and a score in each entry, got {str(entry)[:_SHOWN]}")
        name = str(entry["id"]).strip()
        if name in scores:
            raise UnreadableReplyError(f"the reply has two scores of response {name}")
        scores[name] = _on_scale(_number_of(entry["score"], 1.0), 0.0, 1.0)
    expected = [str(i + 1) for i in range(count)]
    missing, unknown = [n for n in expected if n not in scores], [n for n in scores if n not in expected]
    if missing:
        raise UnreadableReplyError(f"the reply has no score of response {', '.join(missing)}")
    if unknown:
        raise UnreadableReplyError(f"the reply has scores of unknown responses: {', '.join(unknown)}")
    return [scores[name] for name in expected]


def own_objects(objects: Sequence[FoundObject], key: str, quotable: str) -> list[FoundObject]:
    """Those of the objects in a reply that do not stand in the answers, as a quote of them would."""
    quoted = [value for _, _, value in json_objects(quotable, key)]
    return [found for found in objects if found[2] not in quoted]


def json_objects(text: str, key: str) -> Iterator[FoundObject]:
    """Start, end and value of each JSON object in a text that has a key; of nested ones, the outermost.

    An object with a key twice is none.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            if key in value:
                yield position, end, value
            else:
                end = position + 1  # It may be inside.
        position = text.find("{", end)


# A function from the reply to the verdict; raises `UnreadableReplyError`.
ReadVerdict = Callable[[Reply], Any]


def _is_inside(match: re.Match[str], objects: Sequence[FoundObject]) -> bool:
    return any(start <= match.start() < end for start, end, _ in objects)


def _plain(text: str) -> str:
    """Text without differences of case and white space."""
    return " ".join(text.casefold().split())


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return unique


def _no_text(message: Mapping[str, Any], *, cut: bool, reasoning: bool) -> str:
    if cut:
        return f"the reply was cut at max_tokens before its {'verdict' if reasoning else 'text'}; raise it"
    if message.get("refusal"):
        return f"the judge refuses: {str(message['refusal'])[:_SHOWN]}"
    return "the reply has only reasoning, no text" if reasoning else "the reply is empty"


def _token_choices(choice: Mapping[str, Any]) -> tuple[TokenChoice, ...]:
    logprobs = choice.get("logprobs")
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    try:
        return tuple(
            TokenChoice(
                entry["token"],
                {each["token"]: float(each["logprob"]) for each in [entry, *entry.get("top_logprobs", ())]},
            )
            for entry in entries or ()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableReplyError(f"the response has logprobs of another form: {error!r}") from error


def _ends_reply(text: str, end: int) -> bool:
    """True if nothing but marks of a code block or of Markdown follows."""
    return not text[end:].strip(" \n\t`*.")


def _number_of(value: Any, high: float) -> float:
    """A score in JSON: a number, or a text such as "7" or "7/10"."""
    match = re.fullmatch(rf"\s*({_NUMBER})(?:\s*/\s*({_NUMBER}))?\s*", str(value))
    if isinstance(value, bool) or match is None or (match[2] is not None and float(match[2]) != high):
        raise UnreadableReplyError(f"need a number up to {high:g} as a score, got {str(value)[:_SHOWN]!r}")
    return float(match[1])


def _number_place(text: str, start: int, end: int) -> int:
    match = re.compile(rf"\"score\"\s*:\s*\"?({_NUMBER})").search(text, start, end)
    return match.start(1) if match else start


def _on_scale(score: float, low: float, high: float) -> float:
    if not low <= score <= high:
        raise UnreadableReplyError(f"the score {score:g} is not on the scale from {low:g} to {high:g}")
    return score


def _why_none(reply: Reply) -> str:
    return " and was cut at max_tokens, raise it" if reply.cut else ""
