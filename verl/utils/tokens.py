"""Messages to token ids and back: chat templates, stop ids, stop texts, and a character-level tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from verl.config.data import DataConfig
from verl.utils.chat.chat_template import Chat, ChatTemplate
from verl.utils.chat.conversations import EncodedConversation, answer_text, encode_conversation
from verl.utils.chat.template_files import check_template_tokens, read_template, template_names
from verl.utils.hub import generation_config_source, tokenizer_source
from verl.utils.sampling_types import Prompt
from verl.utils.tool_schemas import load_tools

CHARACTERS = "".join(chr(c) for c in range(32, 127)) + "\n"
# Short, since every character is a token: "T:search(query)", "u:Hi", and calls as [search(query="x")], in
# the form `pythonic`. The end token closes an answer, so a conversation only grows at its end.
_CHAT_TEMPLATE = (
    "{% if tools %}T:{% for tool in tools %}{% set f = tool.function or tool %}{{ ',' if not loop.first }}"
    "{{ f.name }}({{ (f.parameters.properties if f.parameters else {}) | join(',') }}){% endfor %}{{ '\n' }}"
    "{% endif %}"
    "{% for m in messages %}{{ m.role[0] + ':' + (m.content or '') }}"
    "{% if m.tool_calls %}[{% for call in m.tool_calls %}{% set f = call.function %}"
    "{{ ', ' if not loop.first }}{{ f.name }}({% for name, value in f.arguments.items() %}"
    "{{ ', ' if not loop.first }}{{ name }}={{ value | tojson }}{% endfor %}){% endfor %}]{% endif %}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class TextCodec:
    """Prompts to token ids, sampled ids to text, and the ids that end an answer.

    Sampled ids are decoded only for rewards and logs; nothing that was sampled is ever tokenized again.

    Args:
        tokenizer: of the model.
        stop_ids: further ids that end an answer.
        system_prompt: put before chats that have no system message.
        template_kwargs: further variables of the chat template.
        tools: schemas of the tools offered in chats that bring none.

    Attributes:
        tokenizer: of the model.
        stop_ids: ids that end a turn: the tokenizer's end token, those with which the chat template closes
            an answer and calls, marks of roles where it closes turns with none, and those given.
        closing_ids: the token with which the chat template closes an answer, if it is one.
        template: the chat template.

    Raises:
        ValueError: a variable that the template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int] = (),
        system_prompt: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.template.check_kwargs(template_kwargs or {})
        if unknown := [number for number in stop_ids if not 0 <= number < len(tokenizer)]:
            raise ValueError(
                f"need sampling.stop_ids below {len(tokenizer)}, the number of tokens, got {unknown}"
            )
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.closing_ids = self.token_ids_of([self.template.end])
        # A turn with a call may end otherwise than an answer, or with the mark of the next role.
        turns = self.token_ids_of(self.template.turns.stops)
        self.stop_ids = tuple(dict.fromkeys([*own, *self.closing_ids, *turns, *stop_ids]))
        self._system_prompt = system_prompt
        self._template_kwargs, self._tools = dict(template_kwargs or {}), tuple(tools)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        stop_ids: Sequence[int] = (),
        system_prompt: str | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> TextCodec:
        """The codec of a saved model, with the end ids of its generation config.

        What a folder with an adapter alone lacks comes from the adapter's base model.

        Args:
            path: folder or hub name.
            stop_ids: further ids that end an answer.
            system_prompt: put before chats that have no system message.
            chat_template: takes the place of the tokenizer's own.
            template_kwargs: further variables of the chat template.
            tools: schemas of the tools offered in chats that bring none.

        Raises:
            ValueError: the folder has no tokenizer.
        """
        tokenizer = load_tokenizer(tokenizer_source(path))
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        try:
            configured = GenerationConfig.from_pretrained(generation_config_source(path)).eos_token_id
        except OSError:  # without generation_config.json, answers end at the tokenizer's end token
            configured = None
        ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
        # A generation config may name ids of a larger vocabulary of its family.
        ends = [number for number in ends if 0 <= number < len(tokenizer)]
        return cls(
            tokenizer,
            stop_ids=[*ends, *stop_ids],
            system_prompt=system_prompt,
            template_kwargs=template_kwargs,
            tools=tools,
        )

    @classmethod
    def for_run(cls, path: str, data: DataConfig, stop_ids: Sequence[int] = ()) -> TextCodec:
        """The codec of a saved model with the settings of a run's data.

        Args:
            path: folder or hub name.
            data: system prompt, chat template with its variables, and tools.
            stop_ids: further ids that end an answer.

        Raises:
            ValueError: the folder has no tokenizer, or a setting is wrong.
        """
        codec = cls.load(
            path,
            stop_ids=stop_ids,
            system_prompt=data.system_prompt,
            chat_template=None if data.chat_template is None else read_template(data.chat_template),
            template_kwargs=data.chat_template_kwargs.values,
            tools=() if data.tools is None else load_tools(data.tools),
        )
        if data.chat_template in template_names():
            check_template_tokens(codec.tokenizer, data.chat_template)
        return codec

    @cached_property
    def num_ids(self) -> int:
        """All ids of tokens are below; a model may have more rows, which are no tokens."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def check_rows(self, rows: int) -> None:
        """Check that a model has a row of its embedding for every token.

        Raises:
            ValueError: it has not, because tokens were added to the tokenizer alone.
        """
        # Text models of multimodal families leave out the rows that pictures and sounds would take.
        media = {getattr(self.tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
        vocabulary = self.tokenizer.get_vocab().items()
        beyond = [token for token, i in vocabulary if i >= rows and token not in media]
        if beyond:
            more = ", ..." if len(beyond) > 5 else ""
            raise ValueError(
                f"the tokenizer has {self.num_ids} ids, but the model's embedding {rows} rows, so that "
                f"{', '.join(sorted(beyond)[:5])}{more} have none; save the model "
                f"after model.resize_token_embeddings({self.num_ids}), or take the tokenizer that it was "
                "trained with"
            )

    def check_use(self, prompts: Sequence[Prompt]) -> None:
        """Check that what is set for chats has an effect: that there are chats among the prompts.

        Raises:
            ValueError: there are none.
        """
        given = {
            "data.system_prompt": self._system_prompt,
            "data.chat_template_kwargs": self._template_kwargs,
            "data.tools": self._tools,
        }
        unread = [name for name, value in given.items() if value]
        if unread and all(is_text(prompt) for prompt in prompts):
            raise ValueError(
                f"{', '.join(unread)} has no effect, as no chat template is applied to prompts that are "
                "texts, and all are; give them as chat messages, or leave the setting out"
            )

    def token_ids_of(self, texts: Sequence[str]) -> list[int]:
        """Ids of those texts that are each one special or added token, such as `<|im_end|>`."""
        added = self.tokenizer.get_added_vocab()
        return [added[text] for text in texts if text in added]

    def token_text(self, token_id: int) -> str:
        """Text of a special or added token, as chat templates write it; "" for any other token."""
        return self._added_texts.get(token_id, "")

    @cached_property
    def _added_texts(self) -> dict[int, str]:
        return {number: text for text, number in self.tokenizer.get_added_vocab().items()}

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The chat messages of a prompt, after the system prompt unless they contain one."""
        if isinstance(prompt.content, str):
            raise ValueError(
                "a text prompt has no messages; give the prompt as [{'role': 'user', 'content': ...}]"
            )
        has_own = any(m["role"] in ("system", "developer") for m in prompt.content)
        if has_own or not self._system_prompt:
            return list(prompt.content)
        return [{"role": "system", "content": self._system_prompt}, *prompt.content]

    def chat(self, prompt: Prompt) -> Chat:
        """A prompt of messages as the chat template takes it, with tools and variables of its row or the run.

        Raises:
            ValueError: it is a text, has content other than text, or names variables that the template does
                not read.
        """
        own = prompt.columns.get("chat_template_kwargs") or {}
        return self.template.chat(
            self.messages(prompt), tools=prompt.tools or self._tools, kwargs={**self._template_kwargs, **own}
        )

    def prompt_text(self, prompt: Prompt) -> str:
        """The text that the model reads: a text as it is, messages by the chat template.

        The answer continues a last message that is the assistant's.

        Raises:
            ValueError: the prompt is messages, and there is no chat template or it does not take them.
        """
        return prompt.content if isinstance(prompt.content, str) else self.template.open(self.chat(prompt))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises ValueError, which names it, if there are none."""
        place = f"prompt {prompt.index} of {prompt.source or 'the data'}"
        try:
            text = self.prompt_text(prompt)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        # A chat template contains its special tokens; for a plain text the tokenizer adds those in front.
        ids = self.encode(text, special_tokens=isinstance(prompt.content, str))
        if not ids:
            raise ValueError(f"{place} has no tokens: {prompt.content!r}")
        return ids

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        learned: Collection[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> EncodedConversation:
        """Token ids of a whole conversation, and which of them are learned.

        The system prompt of the run is put in front, as part of the first message.

        Args:
            messages: at least one; the ids are those of the whole text that the chat template writes.
            tools: offered in it; none: those of the run.
            learned: indices of the assistant messages to learn; None: all.
            template_kwargs: further variables of the template, over those of the run.

        Raises:
            ValueError: the template does not take the messages, or the tokens of one cannot be told.
        """
        given = self.messages(Prompt([dict(m) for m in messages]))
        shift = len(given) - len(messages)
        kwargs = {**self._template_kwargs, **(template_kwargs or {})}
        chat = self.template.chat(given, tools=tools or self._tools, kwargs=kwargs)
        shifted = None if learned is None else [i + shift for i in learned]
        ids, mask, starts = encode_conversation(self.template, chat, learned=shifted)
        return EncodedConversation(ids, mask, [0, *starts[1 + shift :]])

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        ids = list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])
        # Some tokenizers append their end token to a text, which would end the prompt before the answer. One
        # that the text itself ends with stays.
        end = self.tokenizer.eos_token_id
        if special_tokens and ids[-1:] == [end]:
            num_own = trailing(self.encode(text), end)
            while len(ids) > 1 and trailing(ids, end) > num_own:
                ids.pop()
        start = self.tokenizer.bos_token
        if (
            special_tokens
            and start
            and text.startswith(start)
            and ids[:2] == [self.tokenizer.bos_token_id] * 2
        ):
            ids.pop(0)  # the text brings the start token that the tokenizer adds
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of ids with all special tokens, as the model reads it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def decode_prompt(self, prompt_ids: Sequence[int]) -> str:
        """The text of a prompt for a server: with special tokens, except the start token that it adds."""
        start = self.tokenizer.bos_token_id
        ids = prompt_ids[1:] if start is not None and prompt_ids[:1] == [start] else prompt_ids
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def decode_answer(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of an answer, cut before the first stop text if it contains one."""
        text = self.decode(ids)
        cuts = [text.find(s) for s in stop if s in text]
        return text[: min(cuts)] if cuts else text

    def encode_answer(self, text: str, prompt: Prompt | None = None) -> list[int]:
        """Token ids of an answer given as text, with the end token; for fine-tuning and text-only engines.

        Args:
            text: the answer.
            prompt: that it answers. To messages, the answer is what the chat template writes, with the token
                that closes it there; to a text, the tokenizer's end token follows. None: as it stands, with
                the end token of the chat template if it has one.
        """
        closing = self.token_ids_of([self.template.end]) if prompt is None or not is_text(prompt) else []
        if prompt is not None and not is_text(prompt):
            text = answer_text(self.template, self.chat(prompt), text)
        ids = self.encode(text)
        if prompt is not None:
            ids = without_added_space(self.tokenizer, self.encode_prompt(prompt), ids, text)
        ends = [i for i in [*closing, self.tokenizer.eos_token_id] if i is not None]
        return ids if not ends or ids[-1:] == ends[:1] else [*ids, ends[0]]


def trailing(ids: Sequence[int], token: int) -> int:
    """Number of times that a token stands at the end of ids."""
    return next((i for i, one in enumerate(reversed(ids)) if one != token), len(ids))


def without_added_space(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], text: str
) -> list[int]:
    """Ids of a text that follows others, without the space that a tokenizer puts in front of every text."""
    first = str(tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
    if not first.startswith("▁"):
        return list(ids)
    last = list(before[-4:])
    with_space = str(tokenizer.decode(last)) + " " + text
    if str(tokenizer.decode([*last, *ids])) != with_space:
        return list(ids)
    pieces = tokenizer.backend_tokenizer.model.tokenize(first[1:]) if first[1:] else []
    return [*(piece.id for piece in pieces), *ids[1:]]


def is_text(prompt: Prompt) -> bool:
    """True for a prompt that is a text, not messages."""
    return isinstance(prompt.content, str)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved model.

    Raises:
        ValueError: the folder has none.
    """
    try:
        # A tokenizer without a class of its own is fully described by its file. AutoTokenizer may pick a
        # class by the model's family, which splits texts differently (Qwen2's drops the spaces of a
        # character tokenizer).
        is_generic = get_tokenizer_config(path).get("tokenizer_class") in (
            "TokenizersBackend",
            "PreTrainedTokenizerFast",
        )
        return (PreTrainedTokenizerFast if is_generic else AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"need a tokenizer beside the model, found none in {path!r}: {reason}") from error


def character_tokenizer(characters: str = CHARACTERS, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template and one token per character, by default printable ASCII and newline.

    The template writes tools and calls of tools, in the form `pythonic`.

    Special tokens: padding 0, end 1, start 2, unknown 3.

    Args:
        characters: a token each.
        words: texts that are one token each, where they stand; the first that fits is taken.
    """
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    # A word of one character is that character: without a gap in the ids.
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*specials, *characters, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, words), r"[\s\S]"])), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
