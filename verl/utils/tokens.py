"""Messages to token ids and back: chat templates, stop ids, stop texts, and a character-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from verl.utils.sampling_types import Prompt

CHARACTERS = "".join(chr(c) for c in range(32, 127)) + "\n"
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


class TextCodec:
    """Prompts to token ids, sampled ids to text, and the ids that end an answer.

    Sampled ids are decoded only for rewards and logs; nothing that was sampled is ever tokenized again.

    Attributes:
        tokenizer: of the model.
        stop_ids: ids that end an answer: the tokenizer's end token and those of the generation config.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int] = (),
        system_prompt: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.stop_ids = tuple(dict.fromkeys([*own, *stop_ids]))
        self._system_prompt = system_prompt

    @classmethod
    def load(cls, path: str, *, stop_ids: Sequence[int] = (), system_prompt: str | None = None) -> TextCodec:
        """The codec of a saved model, with the end ids of its generation config.

        Raises:
            ValueError: the folder has no tokenizer.
        """
        try:
            # A tokenizer without a class of its own is fully described by its file. AutoTokenizer may pick a
            # class by the model's family, which splits texts differently (Qwen2's drops the spaces of a
            # character tokenizer).
            is_generic = get_tokenizer_config(path).get("tokenizer_class") in (
                "TokenizersBackend",
                "PreTrainedTokenizerFast",
            )
            tokenizer = (PreTrainedTokenizerFast if is_generic else AutoTokenizer).from_pretrained(path)
        except (OSError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            raise ValueError(
                f"need a tokenizer beside the model, found none in {path!r}: {reason}"
            ) from error
        try:
            configured = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # without generation_config.json, answers end at the tokenizer's end token
            configured = None
        ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
        return cls(tokenizer, stop_ids=[*ends, *stop_ids], system_prompt=system_prompt)

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The chat messages of a prompt, after the system prompt unless they contain one."""
        if isinstance(prompt.content, str):
            raise ValueError(
                "a text prompt has no messages; give the prompt as [{'role': 'user', 'content': ...}]"
            )
        has_own = any(m["role"] == "system" for m in prompt.content)
        if has_own or not self._system_prompt:
            return list(prompt.content)
        return [{"role": "system", "content": self._system_prompt}, *prompt.content]

    def prompt_text(self, prompt: Prompt) -> str:
        """The text that the model reads: a text as it is, messages by the chat template.

        Raises:
            ValueError: the prompt is messages, but the tokenizer has no chat template.
        """
        if isinstance(prompt.content, str):
            return prompt.content
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template; "
                "use text prompts or an instruct model"
            )
        text = self.tokenizer.apply_chat_template(
            self.messages(prompt), tokenize=False, add_generation_prompt=True
        )
        return str(text)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises ValueError if there are none."""
        # A chat template contains its special tokens; for a plain text the tokenizer adds those in front.
        ids = self.encode(self.prompt_text(prompt), special_tokens=isinstance(prompt.content, str))
        if not ids:
            raise ValueError(
                f"prompt {prompt.index} of {prompt.source or 'the data'} has no tokens: {prompt.content!r}"
            )
        return ids

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        ids = list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])
        # Some tokenizers append their end token to a text, which would end the prompt before the answer.
        while special_tokens and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

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

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer given as text, with the end token; for fine-tuning and text-only engines."""
        ids = self.encode(text)
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template and one token per character, by default printable ASCII and newline.

    Special tokens: padding 0, end 1, start 2, unknown 3.
    """
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
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
