"""A byte-level BPE tokenizer with awkward merges, and with the special tokens of all families."""

from __future__ import annotations

import random
import re
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from verl.utils.chat.template_files import read_template, template_names, template_tokens

# Tokens that are added, but not as special ones, as the families have them.
TAGS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
]
MORE = ["<bos>", "<eos>", "[gMASK]", "<sop>", "[THINK]", "[/THINK]", "[CALL_ID]", "<|end_of_text|>"]
# The token that the tokenizers of a family call their end token; <eos> if not said.
ENDS = {
    "chatml": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "kimi-k2": "<|im_end|>",
    "deepseek-v3": "<｜end▁of▁sentence｜>",
    "deepseek-v3.1": "<｜end▁of▁sentence｜>",
    "gpt-oss": "<|return|>",
}
CORPUS = [
    'Let me add them.\n\n{"name": "add", "arguments": {"a": 1, "b": 23}}\n',
    "The sum is 42.\n\nuser\n",
    "assistant\n",
    '\n```json\n{"a": 5}\n```',
    "system\n\nBe brief.",
    '": {"a": "x y", "b": true}}',
    '"}}]',
    "Error: no such tool.\n",
    "3 and 7. So 11?\n\n",
    "[add(a=1, b=2)]",
]


@cache
def awkward_bpe() -> Tokenizer:
    """Merges that go over blanks, newlines and brackets, since texts are not split into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def family_tokenizer(template: str, *, end: str = "<eos>") -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template: one of ours by name, or a text."""
    is_name = template in template_names()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(awkward_bpe().to_str()),
        bos_token="<bos>",
        eos_token=ENDS.get(template, end),
        chat_template=read_template(template) if is_name else template,
        clean_up_tokenization_spaces=False,
    )
    specials = [token for name in template_names() for token in template_tokens(name)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*dict.fromkeys([*MORE, *specials])]})
    tokenizer.add_tokens(TAGS)
    return tokenizer


def sampled_ids(tokenizer: PreTrainedTokenizerFast, text: str, generator: random.Random) -> list[int]:
    """Ids of a text as a policy might sample them: pieces that the tokenizer itself would have merged."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, added)) + ")", text):
        if part in added:
            ids.append(tokenizer.convert_tokens_to_ids(part))
            continue
        while part:
            length = generator.randint(1, 6)
            ids += tokenizer(part[:length], add_special_tokens=False)["input_ids"]
            part = part[length:]
    return ids
