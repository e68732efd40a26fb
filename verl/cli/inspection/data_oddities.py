"""Oddities of a data set, each in a sentence: what often is a mistake, though it can be trained on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from verl.cli.inspection.data_facts import DataFacts, Encoded, layouts_of, text_of
from verl.rewards.library.reward_table import REWARDS
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec, is_text
from verl.utils.user_code import load_function

# References that are tried with the built-in rewards.
MOST_CHECKED = 1000
# Built-in rewards that compare an answer with its reference, and need no options for it.
_COMPARING = ("exact", "math", "gsm8k", "choice")


def oddities(facts: DataFacts, held_out: DataFacts | None) -> Iterator[str]:
    """Sentences on what no tokenizer is needed to see.

    Args:
        facts: of the data set.
        held_out: of `data.test`, if it is given, too.
    """
    prompts = facts.prompts
    yield from facts.report.notes
    layouts = layouts_of(facts)
    if len(layouts) > 1:
        listed = "; ".join(f"{name}: {count} rows" for name, count in layouts.most_common())
        yield f"the rows have several layouts: {listed}"
    yield from _repeated(prompts)
    yield from _form_of_prompts(prompts)
    if facts.kind == "train":
        yield from _references(prompts)
    if held_out is not None:
        known = {text_of(prompt.content) for prompt in prompts}
        if shared := sum(text_of(prompt.content) in known for prompt in held_out.prompts):
            yield (
                f"{_share(shared, len(held_out.prompts))} prompts of data.test are in data.train, too, so "
                "an evaluation measures memory"
            )


def token_oddities(
    facts: DataFacts, encoded: Encoded, codec: TextCodec, limits: dict[str, Any]
) -> Iterator[str]:
    """Sentences on what the model reads.

    Args:
        facts: of the data set.
        encoded: its tokens.
        codec: of the model.
        limits: part -> (most tokens, setting), of the parts with a limit.
    """
    count, tokenizer = len(facts.prompts), codec.tokenizer
    if encoded.refused:
        refused = _share(len(encoded.refused), count)
        yield f"{refused} rows are refused by the chat template: {encoded.refused[0]}"
    start = tokenizer.bos_token_id
    if doubled := sum(ids[:2] == [start, start] for ids in encoded.ids):
        yield f"{_share(doubled, count)} prompts begin with two start tokens {tokenizer.bos_token}"
    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    written = Counter(
        token for prompt in facts.prompts for token in special if token in text_of(prompt.content)
    )
    if written:
        listed = ", ".join(f"{token} ({number} rows)" for token, number in written.most_common(3))
        yield f"prompts contain the text of special tokens, which the model reads as such: {listed}"
    if tokenizer.chat_template and all(is_text(prompt) for prompt in facts.prompts):
        yield (
            "all prompts are texts, so the chat template of this model is not applied; give chat messages if "
            "it is to answer as in a chat"
        )
    for part, (limit, setting) in limits.items():
        if over := sum(length > limit for length in encoded.lengths.get(part, ())):
            yield (
                f"{_share(over, count)} rows have more than {limit} tokens in the {part}, {setting}, and are "
                "left out or cut"
            )


def _repeated(prompts: Sequence[Prompt]) -> Iterator[str]:
    answers: dict[str, set[str]] = {}
    for prompt in prompts:
        answers.setdefault(text_of(prompt.content), set()).add(repr(prompt.answer))
    if repeated := len(prompts) - len(answers):
        yield f"{_share(repeated, len(prompts))} rows repeat an earlier prompt"
    if torn := sum(len(of_one) > 1 for of_one in answers.values()):
        yield f"{torn} prompts occur with different answers"


def _form_of_prompts(prompts: Sequence[Prompt]) -> Iterator[str]:
    texts = [prompt.content for prompt in prompts if isinstance(prompt.content, str)]
    chats = [prompt.content for prompt in prompts if not isinstance(prompt.content, str)]
    said = [
        *texts,
        *(m["content"] for chat in chats for m in chat if isinstance(m["content"], str) and m["content"]),
    ]
    if padded := sum(text != text.strip() for text in said):
        what = "texts" if chats else "prompts"
        yield f"{_share(padded, len(said))} {what} begin or end with white space, which the model reads"
    if texts and chats:
        yield f"{len(texts)} prompts are texts and {len(chats)} chats; the chat template is for chats alone"
    if silent := sum(all(message["role"] != "user" for message in chat) for chat in chats):
        yield f"{_share(silent, len(chats))} chats have no message of the user"


def _references(prompts: Sequence[Prompt]) -> Iterator[str]:
    given = [prompt for prompt in prompts if prompt.answer not in (None, "", [])]
    if not given:
        yield "no row has a reference answer; the rewards must do without one"
        return
    if lacking := len(prompts) - len(given):
        yield f"{_share(lacking, len(prompts))} rows have no reference answer"
    texts = [prompt.answer for prompt in given if isinstance(prompt.answer, str)]
    if padded := sum(text != text.strip() for text in texts):
        yield f"{_share(padded, len(given))} reference answers begin or end with white space"
    if shown := sum(_is_shown(prompt) for prompt in given):
        yield f"{_share(shown, len(given))} reference answers occur in their prompts"
    checked = given[:MOST_CHECKED]
    problems = {prompt.index: comparisons(prompt) for prompt in checked}
    if lost := [reasons for reasons in problems.values() if all(reasons.values())]:
        yield (
            f"{_share(len(lost), len(checked))} reference answers can be compared by no built-in reward: "
            f"{next(iter(lost[0].values()))}"
        )
    if len(given) > 1 and len({repr(prompt.answer) for prompt in given}) == 1:
        yield f"all reference answers are {given[0].answer!r}"


def _is_shown(prompt: Prompt) -> bool:
    """True if the reference is in the prompt as words of their own."""
    reference = str(prompt.answer).strip()
    whole = rf"(?<!\w){re.escape(reference)}(?!\w)"
    return bool(reference) and re.search(whole, text_of(prompt.content)) is not None


def comparisons(prompt: Prompt) -> dict[str, str]:
    """Reason why a reference cannot be compared, for each built-in reward that reads one; "" if it can."""
    found = {}
    for name in _COMPARING:
        try:
            load_function(REWARDS[name].check, user="check")(prompt)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def _share(count: int, total: int) -> str:
    return f"{count} of {total}"
