"""vLLM in the process of the trainer, over a real model: the contract of generation, new weights, and its
end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import random_prompts, tiny_codec, tiny_transformer
from verl.utils.sampling_types import Completion, SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_PLUGINS", "")

from verl.rollout.vllm.in_process import VLLMEngine

pytestmark = pytest.mark.vllm

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = random_prompts([3, 11, 1, 6])
ENDS = tuple(range(20, 32))
MODEL = tiny_transformer("qwen2", **SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    MODEL.save_pretrained(folder)
    tiny_codec().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(
        str(folder), tiny_codec(), options={"max_model_len": 256}, dtype="float32", max_slots=8
    )
    yield engine
    engine.close()
    engine.close()


def answer(engine: VLLMEngine, prompt: list[int], **options) -> list[Completion]:
    return engine.generate([prompt], [SamplingParams(**options)])[0]


def refresh(seed: int) -> dict[str, Tensor]:
    MODEL.load_state_dict(tiny_transformer("qwen2", seed=seed, **SIZES).state_dict())
    return {name: tensor.detach() for name, tensor in MODEL.named_parameters()}


def own_logprobs(prompt: list[int], ids: list[int], temperature: float = 1.0, top_k: int = 0) -> list[float]:
    with torch.no_grad():
        logits = MODEL(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    return logits.log_softmax(-1)[range(len(ids)), ids].tolist()


def assert_follows(engine: VLLMEngine) -> None:
    (completion,) = answer(engine, PROMPTS[1], max_tokens=20)
    assert completion.logprobs == pytest.approx(
        own_logprobs(PROMPTS[1], list(completion.token_ids)), abs=1e-4
    )


def test_an_answer_depends_on_its_prompt_seed_and_number_alone(engine):
    params = [
        SamplingParams(temperature=0.9, max_tokens=12, n=n, stop_ids=ENDS, seed=40 + n) for n in (2, 3, 1, 5)
    ]
    together = engine.generate(PROMPTS, params)
    alone = [engine.generate([prompt], [wanted])[0] for prompt, wanted in zip(PROMPTS, params, strict=True)]
    ids = [[c.token_ids for c in group] for group in together]
    assert [len(group) for group in ids] == [2, 3, 1, 5]
    assert ids == [[c.token_ids for c in group] for group in alone]
    assert len({tuple(i) for i in ids[3]}) > 1


def test_logprobs_are_of_the_distribution_that_was_drawn_from(engine):
    assert_follows(engine)
    (completion,) = answer(engine, PROMPTS[1], max_tokens=20, temperature=0.7, top_k=5, seed=1)
    own = own_logprobs(PROMPTS[1], list(completion.token_ids), 0.7, 5)
    assert completion.logprobs == pytest.approx(own, abs=1e-4)
    (greedy,) = answer(engine, PROMPTS[1], max_tokens=20, temperature=0, top_k=5)
    assert greedy.logprobs == pytest.approx(own_logprobs(PROMPTS[1], list(greedy.token_ids)), abs=1e-4)


def test_answers_end_with_a_stop_id_or_at_their_length(engine):
    completions = answer(engine, PROMPTS[0], max_tokens=40, n=12, stop_ids=ENDS)
    stopped = [c.token_ids for c in completions if c.finish_reason == "stop"]
    assert len(stopped) > 4 and all(ids[-1] in (*ENDS, 1) and not {*ENDS, 1} & {*ids[:-1]} for ids in stopped)
    assert [
        (c.finish_reason, len(c.token_ids)) for c in answer(engine, PROMPTS[0], max_tokens=1, n=2, seed=3)
    ] == [("length", 1)] * 2


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(engine):
    free = next(
        c
        for c in answer(engine, PROMPTS[0], max_tokens=30, n=20, seed=2)
        if min(c.token_ids) > 3 and len(c.token_ids) > 8
    )
    number = [c.token_ids for c in answer(engine, PROMPTS[0], max_tokens=30, n=20, seed=2)].index(
        free.token_ids
    )
    text = tiny_codec().decode(free.token_ids)
    ended = answer(engine, PROMPTS[0], max_tokens=30, n=20, seed=2, stop=(text[4:7],))[number]
    assert (
        ended.finish_reason == "stop"
        and tiny_codec().decode(ended.token_ids) == text[: text.index(text[4:7]) + 3]
    )


def test_prompts_that_cannot_be_answered_are_errors(engine):
    assert engine.generate([], []) == []
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens and may get 128 more; need at least one"):
        engine.generate([[5], []], [SamplingParams()] * 2)
    with pytest.raises(
        ValueError,
        match="prompt 0 has 250 tokens and may get 7 more; need at least one, and at most 256 in all",
    ):
        answer(engine, [5] * 250, max_tokens=7)
    with pytest.raises(
        ValueError, match="need sampling parameters for each prompt, got 2 prompts and 1 parameters"
    ):
        engine.generate(PROMPTS[:2], [SamplingParams()])


def test_new_weights_are_followed_and_named(engine):
    for version, seed in enumerate((1, 2), start=1):
        weights = refresh(seed)
        assert engine.load(iter(weights.items()), version) == fingerprint(
            {n: digest(t) for n, t in weights.items()}
        )
        assert_follows(engine)
        assert answer(engine, PROMPTS[0], max_tokens=1)[0].version == version == engine.version


def test_an_update_without_all_weights_is_an_error_and_the_next_one_repairs_it(engine):
    weights = refresh(3)
    with pytest.raises(RuntimeError, match="without all weights of .*down_proj"):
        engine.load([(n, t) for n, t in weights.items() if "layers.1.mlp.down_proj" not in n], 4)
    assert engine.version != 4

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights.items())[:2]
        raise OSError("the trainer broke off")

    with pytest.raises(OSError, match="broke off"):
        engine.load(broken(), 5)
    engine.load(weights.items(), 6)
    assert_follows(engine)


def test_it_sleeps_and_wakes(engine):
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate([[3, 4]], [SamplingParams(max_tokens=1)])
    engine.load(refresh(4).items(), 7)
    assert_follows(engine)


def test_options_are_passed_on_and_wrong_ones_are_errors(folder):
    with pytest.raises(ValueError, match="engine_options: .*no_such_option"):
        VLLMEngine(str(folder), tiny_codec(), options={"no_such_option": 1}, dtype="float32", max_slots=8)
    with pytest.raises(ValueError, match="cannot set logprobs-mode"):
        VLLMEngine(
            str(folder), tiny_codec(), options={"logprobs_mode": "raw_logprobs"}, dtype="float32", max_slots=8
        )
