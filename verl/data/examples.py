"""Examples that are learned: conversations, texts with answers, and their rows of tokens within limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from verl.config.data import AnswersDataConfig, SFTDataConfig
from verl.data.dataset import LoadReport, drop_long_prompts, load_rows
from verl.data.reading.data_files import Split
from verl.data.reading.layouts import Messages, ParsedRow, conversation_of, prompt_of
from verl.data.reading.row_cells import MalformedRow, check_encodable, describe
from verl.data.reading.sources import SourceSetting
from verl.utils.chat.conversations import EncodedConversation
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

# Flags of a message that tell if it is learned: OpenAI's fine-tuning format, and a common other one.
_FLAGS = ("weight", "train")
_MAX_PROBLEMS = 5


class Learned(NamedTuple):
    """The messages of a conversation that are learned, by their indices."""

    indices: tuple[int, ...]


# Of a prompt that is a text: a text. Of messages: the text or messages of an answer to them, or `Learned`,
# which picks the answers among the messages themselves.
Answer = str | Messages | Learned


class AnswerRow(NamedTuple):
    """Tokens of a prompt with an answer.

    Attributes:
        prompt_ids: all tokens before the first that is learned, at least one.
        response_ids: from there to the last token that is learned.
        mask: [len(response_ids)], True for the learned tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[bool]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.response_ids)


def load_examples(
    source: SourceSetting, config: SFTDataConfig, *, split: Split
) -> tuple[list[Prompt], LoadReport]:
    """Examples for supervised fine-tuning, and a report of what was left out.

    A row is a conversation in any layout of `conversation_of`, or a prompt that is a text with an answer.
    The content of a conversation's `Prompt` is all its messages, and its `answer` is `Learned`. Of a text the
    answer is the text to learn.

    Which answers are learned: those of the assistant, all or the last as `config.train_on` says, and in a
    layout with a prompt only those after it. A message's own `weight` (0 or 1) or `train` (false or true)
    overrides it.

    Raises:
        ValueError: as `load_prompts`. A row in which nothing is learned is malformed.
    """

    def parse(row: dict[str, Any]) -> ParsedRow:
        # TRL's rows of unpaired preferences.
        if row.get("label") is False and "completion" in row:
            raise MalformedRow(
                "need answers to learn, got a completion with label false, which marks a bad one; leave such "
                "rows out"
            )
        chat = conversation_of(row, config)
        if chat is not None:
            answers = [m for m in chat.messages if m["role"] == "assistant"]
            if is_recorded(row) and not any(answer.get("weight", 1) for answer in answers):
                return ParsedRow(chat.messages, Learned(()), set(chat.used_columns), chat.tools)
            learned = learned_messages(chat.messages, config.train_on, num_prompt=chat.num_prompt)
            messages = [{k: v for k, v in m.items() if k not in _FLAGS} for m in chat.messages]
            return ParsedRow(messages, Learned(learned), set(chat.used_columns), chat.tools)
        parsed = prompt_of(row, config)
        if not isinstance(parsed.answer, str) or not parsed.answer:
            raise MalformedRow(f"need an answer that is a text and not empty, got {describe(parsed.answer)}")
        check_encodable(parsed.answer)
        return parsed

    examples, report = load_rows(source, config, split, parse)
    kept = [example for example in examples if example.answer != Learned(())]
    if not kept:
        raise ValueError(f"need an episode with something to learn, {report.source} has none")
    if num_empty := len(examples) - len(kept):
        note = f"{num_empty} recorded episodes without a reward or a turn to learn left out"
        report = replace(report, notes=(*report.notes, note))
    return (kept, report) if config.min_reward is None else keep_rewarded(kept, report, config.min_reward)


def is_recorded(row: Mapping[str, Any]) -> bool:
    """True for a row of an episode that a run recorded (`tracking.episodes`)."""
    return {"messages", "tools", "ending", "outcome"} <= row.keys()


def keep_rewarded(
    examples: Sequence[Prompt], report: LoadReport, least: float
) -> tuple[list[Prompt], LoadReport]:
    """Examples with a reward of at least `least`, and the report that counts the others.

    Raises:
        ValueError: a row has no reward, or none has enough.
    """
    for example in examples:
        if not isinstance(example.columns.get("reward"), int | float):
            found = describe(example.columns.get("reward"))
            raise ValueError(
                f"need a number in the column 'reward' of every row for data.min_reward, got {found} in row "
                f"{example.index} of {report.source}; leave data.min_reward out, or add the rewards"
            )
    kept = [example for example in examples if example.columns["reward"] >= least]
    if not kept:
        most = max(example.columns["reward"] for example in examples)
        raise ValueError(
            f"need a row with a reward of data.min_reward {least:g} or more, the best has {most:g}"
        )
    note = f"{len(examples) - len(kept)} rows with a reward below {least:g} left out"
    return kept, replace(report, notes=(*report.notes, note))


def learned_messages(
    messages: Sequence[Mapping[str, Any]], train_on: Literal["all", "last"], *, num_prompt: int = 0
) -> tuple[int, ...]:
    """Indices of the messages that are learned.

    Args:
        messages: of a conversation, checked.
        train_on: the answers of the assistant that are learned where a message has no flag of its own.
        num_prompt: messages in front that are never learned unless they say so.

    Raises:
        MalformedRow: a flag that is neither 0 nor 1, a message to learn that is not the assistant's or says
            nothing, or nothing to learn.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= num_prompt]
    default = answers if train_on == "all" else answers[-1:]
    learned = []
    for i, message in enumerate(messages):
        flag = _flag(message, i)
        if flag and message["role"] != "assistant":
            raise MalformedRow(
                f"need messages of the assistant to learn, got message {i + 1} of role {message['role']!r} "
                "with weight or train"
            )
        if i in default if flag is None else flag:
            _check_says_something(message, i)
            learned.append(i)
    if not learned:
        cause = "all have weight 0 or train false" if answers else "it has no answer of the assistant"
        raise MalformedRow(f"need an answer of the assistant to learn, got a conversation without: {cause}")
    if learned[0] == 0:
        raise MalformedRow(
            "need a message before the answer to learn, got a conversation that begins with it"
        )
    return tuple(learned)


def answer_row(codec: TextCodec, prompt: Prompt, answer: Any) -> AnswerRow:
    """Tokens of a prompt with an answer, as the chat template writes the whole of them.

    Args:
        codec: of the model.
        prompt: text or messages.
        answer: an `Answer`.

    Raises:
        ValueError: the template does not take the messages, or the learned tokens cannot be told.
    """
    if isinstance(prompt.content, str):
        ids = codec.encode_answer(str(answer), prompt)
        return AnswerRow(codec.encode_prompt(prompt), ids, [True] * len(ids))
    messages, learned = whole_conversation(prompt.content, answer)
    ids, mask, _ = _encode(codec, prompt, messages, learned)
    if True not in mask:
        raise ValueError("the chat template writes no token of the answer to learn")
    # The first token of all is predicted by nothing.
    first, end = max(1, mask.index(True)), len(mask) - mask[::-1].index(True)
    return AnswerRow(ids[:first], ids[first:end], mask[first:end])


def whole_conversation(content: Messages, answer: Any) -> tuple[Messages, tuple[int, ...]]:
    """All messages of a prompt with an `Answer`, and the indices of those that are learned."""
    if isinstance(answer, Learned):
        return content, answer.indices
    if isinstance(answer, str):
        *before, last = content
        if last["role"] == "assistant" and isinstance(last["content"], str):  # the answer continues it
            return [*before, {**last, "content": last["content"] + answer}], (len(before),)
        answer = [{"role": "assistant", "content": answer}]
    first = len(content)
    return [*content, *answer], tuple(first + i for i, m in enumerate(answer) if m["role"] == "assistant")


def question_of(example: Prompt) -> Prompt:
    """The prompt before the last learned answer of an example, with that answer as a text."""
    if isinstance(example.content, str):
        return example
    messages, learned = whole_conversation(example.content, example.answer)
    last = messages[learned[-1]]
    reference = last["content"] or json.dumps(last.get("tool_calls"), ensure_ascii=False)
    return replace(example, content=messages[: learned[-1]], answer=reference)


@dataclass(frozen=True)
class RowLimits:
    """Lengths within which rows are learned.

    Attributes:
        prompt_tokens: of the longest prompt.
        tokens: of the longest row.
        setting: where `tokens` comes from, for messages.
    """

    prompt_tokens: int
    tokens: int
    setting: str

    @classmethod
    def of(cls, config: AnswersDataConfig, context: int) -> RowLimits:
        """The limits of the settings, for a model with this context.

        Raises:
            ValueError: the setting is larger than the context.
        """
        limit = config.max_sequence_tokens
        if limit is not None and limit > context:
            raise ValueError(
                f"need data.max_sequence_tokens within the model's context of {context} tokens, got {limit}; "
                "lower it, or leave it out"
            )
        if limit is None:
            return cls(config.max_prompt_tokens, context, "the model's context")
        return cls(config.max_prompt_tokens, limit, "data.max_sequence_tokens")


class FittedRow(NamedTuple):
    """A row within the limit of its length.

    Attributes:
        row: itself, or the beginning of it; None if nothing of it fits.
        is_cut: it is the beginning of a longer one.
        num_prompt: tokens of the prompt.
        num_tokens: tokens of all its answers with their prompts; of the longest one if nothing fits.
        num_learned: learned tokens among them.
    """

    row: Prompt | None
    is_cut: bool
    num_prompt: int
    num_tokens: int
    num_learned: int


Encode = Callable[[Prompt], Sequence[AnswerRow]]
Cut = Callable[[Prompt, int], Prompt | None]


def fit_row(row: Prompt, limit: int, encode: Encode, cut: Cut) -> FittedRow:
    """A row of at most `limit` tokens; `encode` and `cut` are those of `fit_rows`."""
    encoded, is_cut = encode(row), False
    longest = max(answer.num_tokens for answer in encoded)
    if longest > limit:
        shorter = cut(row, limit)
        if shorter is None:
            return FittedRow(None, False, 0, longest, 0)
        row, encoded, is_cut = shorter, encode(shorter), True
    num_tokens = sum(answer.num_tokens for answer in encoded)
    num_learned = sum(sum(answer.mask) for answer in encoded)
    return FittedRow(row, is_cut, len(encoded[0].prompt_ids), num_tokens, num_learned)


def never_cut(row: Prompt, limit: int) -> None:
    """A row has no shorter form."""
    return


def fit_rows(
    rows: Sequence[Prompt],
    report: LoadReport,
    limits: RowLimits,
    encode: Encode,
    *,
    cut: Cut = never_cut,
    skips: bool = False,
) -> tuple[list[Prompt], LoadReport]:
    """Rows within limits, and the report with what was dropped or cut.

    Args:
        rows: as they were read.
        report: of their source.
        limits: for prompts and rows.
        encode: gives the tokens of each answer to a row.
        cut: gives a row that is too long without its end; None: it has no shorter form.
        skips: leave out rows that `encode` refuses, instead of an error.

    Raises:
        ValueError: a row that `encode` refuses, or no row is within the limits.
    """
    fitted: list[FittedRow] = []
    problems: list[str] = []
    for row in rows:
        try:
            fitted.append(fit_row(row, limits.tokens, encode, cut))
        except ValueError as error:
            problems.append(f"row {row.index} (from 0): {error}")
    report = with_refused(report, problems, skips=skips, usable=len(fitted))
    inside = [f for f in fitted if f.row is not None]
    if not inside:
        raise ValueError(
            f"need a row of at most {limits.tokens} tokens ({limits.setting}), but the shortest of "
            f"{len(rows)} has {min(f.num_tokens for f in fitted)}; raise data.max_sequence_tokens, or take a "
            "model with a longer context"
        )
    kept, dropped = drop_long_prompts(
        [f.row for f in inside if f.row], [f.num_prompt for f in inside], limits.prompt_tokens
    )
    used = [f for f in inside if f.num_prompt <= limits.prompt_tokens]
    notes = [f"{sum(f.num_tokens for f in used)} tokens, {sum(f.num_learned for f in used)} of them learned"]
    if num_cut := sum(f.is_cut for f in used):
        notes.append(f"{num_cut} conversations cut at a turn to fit {limits.tokens} tokens, {limits.setting}")
    if num_long := len(fitted) - len(inside):
        notes.append(f"{num_long} rows longer than {limits.tokens} tokens, {limits.setting}, dropped")
    return kept, replace(
        report,
        num_too_long=dropped["num_too_long"],
        longest=dropped["longest"],
        notes=(*report.notes, *notes),
    )


def cut_at_turn(codec: TextCodec, example: Prompt, limit: int) -> Prompt | None:
    """A conversation up to the last learned answer that ends within `limit` tokens; None: there is none."""
    if not isinstance(example.answer, Learned) or isinstance(example.content, str):
        return None
    indices = example.answer.indices
    starts = _encode(codec, example, example.content, indices).turn_starts
    for count in range(len(indices) - 1, 0, -1):
        end = indices[count - 1] + 1
        if starts[end - 1] >= limit:  # its answer begins beyond it
            continue
        shorter = replace(example, content=example.content[:end], answer=Learned(indices[:count]))
        if answer_row(codec, shorter, shorter.answer).num_tokens <= limit:
            return shorter
    return None


def _encode(
    codec: TextCodec, prompt: Prompt, messages: Messages, learned: Sequence[int]
) -> EncodedConversation:
    """Tokens of a conversation with the tools and the variables of the template of its row."""
    own = prompt.columns.get("chat_template_kwargs")
    return codec.encode_conversation(messages, prompt.tools, learned=learned, template_kwargs=own)


def _flag(message: Mapping[str, Any], index: int) -> bool | None:
    """True or false if a message says that it is learned or not; None: it says nothing."""
    given = {name: message[name] for name in _FLAGS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise MalformedRow(
                f"need {name} 0 or 1 in a message, got {describe(value)} in message {index + 1}"
            )
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise MalformedRow(f"need weight and train to agree, got {given} in message {index + 1}")
    return next(iter(values), None)


def _check_says_something(message: Mapping[str, Any], index: int) -> None:
    if not (message["content"] or message.get("tool_calls") or message.get("reasoning_content")):
        raise MalformedRow(
            f"need an answer to learn that is not empty, got none in message {index + 1}; leave it out of "
            "what is learned with weight 0"
        )


def with_refused(report: LoadReport, problems: Sequence[str], *, skips: bool, usable: int) -> LoadReport:
    """The report of a source with rows that the chat template refused, which are left out.

    Args:
        report: of all rows.
        problems: place and cause, one for each refused row.
        skips: leave them out, instead of an error.
        usable: number of rows that are left.

    Raises:
        ValueError: there are some, and they are not skipped or none is left.
    """
    if not problems:
        return report
    if skips and usable:
        all_problems = (*report.problems, *problems)[:_MAX_PROBLEMS]
        num_malformed = report.num_malformed + len(problems)
        return replace(report, num_malformed=num_malformed, problems=all_problems)
    listed = "".join(f"\n  {report.source}, {problem}" for problem in problems[:_MAX_PROBLEMS])
    more = f"\n  and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
    skip = ", or leave them out with data.on_malformed=skip" if usable else ""
    raise ValueError(
        f"{len(problems)} of {report.num_rows} rows cannot be used:{listed}{more}\ncorrect them{skip}"
    )
