"""Prompts to token ids, and sampled ids to text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.tiny import merging_tokenizer, tiny_transformer
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import CHARACTERS, TextCodec, character_tokenizer

USER = {"role": "user", "content": "2+2?"}


def codec(**options) -> TextCodec:
    return TextCodec(character_tokenizer(), **options)


def closing_tokenizer(template: str = "<bos> $A <eos>") -> PreTrainedTokenizerFast:
    """The character tokenizer, but one that puts special tokens around texts."""
    tokenizer = character_tokenizer()
    specials = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=specials
    )
    return tokenizer


def test_text_of_every_character_is_the_same_after_encoding_and_decoding():
    assert codec().decode(codec().encode(CHARACTERS)) == CHARACTERS
    assert len(codec().encode(CHARACTERS)) == len(CHARACTERS) == 96


def test_a_tokenizer_of_few_characters_has_few_ids():
    tokenizer = character_tokenizer("01+=0")
    assert len(tokenizer) == 4 + 4
    assert tokenizer("0+x")["input_ids"] == [4, 6, tokenizer.unk_token_id]


def test_messages_are_written_in_the_chat_template_with_the_answer_opened():
    assert codec().prompt_text(Prompt([USER])) == "u:2+2?\na:"
    assert codec().decode(codec().encode_prompt(Prompt([USER]))) == "u:2+2?\na:"


def test_the_system_prompt_comes_first_unless_the_messages_have_one():
    speaks = codec(system_prompt="Be brief.")
    own = {"role": "system", "content": "Think."}
    assert speaks.prompt_text(Prompt([USER])) == "s:Be brief.\nu:2+2?\na:"
    assert speaks.prompt_text(Prompt([own, USER])) == "s:Think.\nu:2+2?\na:"
    assert speaks.prompt_text(Prompt("2+2=")) == "2+2="


def test_a_text_prompt_has_no_messages():
    with pytest.raises(ValueError, match="a text prompt has no messages"):
        codec().messages(Prompt("2+2="))


def test_messages_need_a_chat_template():
    with pytest.raises(
        ValueError, match="the tokenizer has no chat template; use text prompts or an instruct model"
    ):
        TextCodec(merging_tokenizer()).encode_prompt(Prompt([USER]))


def test_a_prompt_without_tokens_is_named():
    with pytest.raises(ValueError, match="prompt 7 of gsm8k has no tokens: ''"):
        codec().encode_prompt(Prompt("", source="gsm8k", index=7))


def test_a_prompt_keeps_the_start_token_and_loses_the_end_token_of_its_tokenizer():
    closing = TextCodec(closing_tokenizer())
    assert closing.encode_prompt(Prompt("ab")) == [2, *codec().encode("ab")]
    twice = TextCodec(closing_tokenizer("$A <eos> <eos>"))
    assert twice.encode_prompt(Prompt("ab")) == codec().encode("ab")


def test_a_prompt_that_ends_with_the_end_token_keeps_it():
    for template in ("<bos> $A", "<bos> $A <eos>"):
        closing = TextCodec(closing_tokenizer(template))
        assert closing.encode_prompt(Prompt("ab<eos>")) == [2, *codec().encode("ab"), 1]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_an_answer_to_a_text_gets_no_space_that_its_author_did_not_write(scheme):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        ["1+1= 42 is 2 4"] * 3, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"])
    )
    spaced = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    coder = TextCodec(spaced)
    prompt = Prompt("1+1=")
    for answer in ("42", " 42", "is 42"):
        ids = [*coder.encode_prompt(prompt), *coder.encode_answer(answer, prompt)]
        assert coder.decode_all(ids) == f"1+1={answer}</s>"


def test_a_chat_prompt_gets_no_special_tokens_but_those_of_its_template():
    assert TextCodec(closing_tokenizer()).encode_prompt(Prompt([USER])) == codec().encode("u:2+2?\na:")


def test_an_answer_that_came_as_text_is_closed_once():
    assert codec().encode_answer("4") == [*codec().encode("4"), 1]
    assert codec().encode_answer("4<eos>") == [*codec().encode("4"), 1]
    assert codec().encode_answer("") == [1]


def test_an_answer_has_no_special_tokens_and_ends_before_the_first_stop_text():
    ids = [2, *codec().encode("x=4;\ny=5;"), 1]
    assert codec().decode_answer(ids) == "x=4;\ny=5;"
    assert codec().decode_answer(ids, (";", "=")) == "x"
    assert codec().decode_answer(ids, ("?", "\n")) == "x=4;"
    assert codec().decode_answer(ids, ("x",)) == ""


@pytest.mark.parametrize("wrong", [-1, 99999])
def test_stop_ids_that_are_no_tokens_are_refused(wrong):
    with pytest.raises(
        ValueError, match=rf"need sampling.stop_ids below \d+, the number of tokens, got \[{wrong}\]"
    ):
        codec(stop_ids=[wrong])


def test_sampled_ids_need_not_be_those_of_their_text():
    merging = TextCodec(merging_tokenizer())
    sampled = [1, 2, 1]
    assert merging.decode(sampled) == "aba"
    assert merging.encode("aba") == [3, 1] != sampled


def test_answers_end_at_the_tokenizers_end_and_at_those_given():
    assert codec().stop_ids == (1,)
    assert codec(stop_ids=[9, 1, 5]).stop_ids == (1, 9, 5)


@pytest.mark.parametrize(("ends", "expected"), [(7, (1, 7, 9)), ([7, 1, 8], (1, 7, 8, 9)), (None, (1, 9))])
def test_answers_also_end_at_those_of_the_models_generation_settings(ends, expected, tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    assert TextCodec.load(str(tmp_path), stop_ids=[9]).stop_ids == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2"])
def test_a_tokenizer_is_loaded_as_it_was_saved_whatever_model_is_beside_it(family, tmp_path):
    tiny_transformer(family).config.save_pretrained(tmp_path)
    closing_tokenizer("<bos> $A").save_pretrained(tmp_path)
    loaded = TextCodec.load(str(tmp_path), system_prompt="Hi")
    assert loaded.encode_prompt(Prompt("a + b\n")) == [2, *codec().encode("a + b\n")]
    assert loaded.prompt_text(Prompt([USER])) == "s:Hi\nu:2+2?\na:"
    assert loaded.stop_ids == (1,)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"need a tokenizer beside the model, found none in '{tmp_path}'"):
        TextCodec.load(str(tmp_path))


def test_the_start_token_is_not_doubled():
    adds = TextCodec(closing_tokenizer("<bos> $A"))
    assert (
        adds.encode_prompt(Prompt("<bos>ab")) == adds.encode_prompt(Prompt("ab")) == [2, *adds.encode("ab")]
    )
    adds.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert adds.encode_prompt(Prompt([USER])) == [2, *adds.encode("2+2?")]


def test_stop_texts_that_are_tokens_have_ids():
    assert codec().token_ids_of(["<eos>", "a", "\n", "<eos>a"]) == [1]


def test_a_model_needs_a_row_for_each_token():
    coder = codec()
    assert coder.num_ids == 100
    coder.check_rows(100)
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    with pytest.raises(
        ValueError, match="has 102 ids, but the model's embedding 100 rows, so that </think>, <think>"
    ):
        TextCodec(tokenizer).check_rows(100)
    TextCodec(tokenizer).check_rows(104)


def test_the_picture_of_a_family_needs_no_row_in_its_text_model():
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.image_token = "<image>"
    TextCodec(tokenizer).check_rows(100)


def test_thoughts_are_seen_by_rewards_if_their_tokens_are_plain_ones():
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    coder = TextCodec(tokenizer)
    assert coder.decode(coder.encode("<think>a<tool>b")) == "<think>ab"


def test_words_of_a_character_tokenizer_are_one_token_each_wherever_they_stand():
    # Words that are there already leave no gap in the ids, which would have no row in an embedding.
    tokenizer = character_tokenizer(words=["[guess(number=", ")]", "higher", "5", "higher"])
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    text = "u:Hi\na:[guess(number=12)]<eos>t:higher\na:[guess(numb"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len("u:Hi\na:_12__t:_\na:[guess(numb")
    chat = [{"role": "user", "content": "higher?"}]
    tools = [
        {"type": "function", "function": {"name": "guess", "parameters": {"properties": {"number": {}}}}}
    ]
    assert tokenizer.apply_chat_template(chat, tools=tools, tokenize=False) == "T:guess(number)\nu:higher?\n"
