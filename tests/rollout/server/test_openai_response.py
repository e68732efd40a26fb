"""Text of an answer while its tokens arrive: stop texts and characters of several tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_codec
from verl.rollout.server.openai_response import IncrementalDetokenizer
from verl.utils.tokens import TextCodec


def test_text_is_held_back_while_it_may_become_a_stop_text():
    codec = tiny_codec()
    text = IncrementalDetokenizer(codec, ["END", "DO"])
    said = [text.add(codec.encode(part), is_last=False) for part in ("a E", "N", "Q D", "x EN")]
    assert said == ["a ", "", "ENQ ", "Dx "]
    assert text.add(codec.encode("D"), is_last=True) == ""


def test_the_last_text_is_given_out_whole():
    codec = tiny_codec()
    text = IncrementalDetokenizer(codec, ["END"])
    assert text.add(codec.encode("the EN"), is_last=True) == "the EN"


def test_a_character_of_several_tokens_is_given_out_once_it_is_whole():
    pieces = list("ðŁĺĢa")  # how byte-level tokenizers spell F0 9F 98 80 and 61
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoders.ByteLevel()
    text = IncrementalDetokenizer(TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer)), [])
    assert [text.add([i], is_last=False) for i in (4, 0, 1, 2, 3, 4)] == ["a", "", "", "", "😀", "a"]
    # What ends in the midst of a character is given out as it is.
    assert text.add([0, 1], is_last=True) == text._codec.decode([0, 1])
