"""Generation with the trainer's own weights: equal logprobs, shared storage, prompts computed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.tiny import (
    FAMILIES,
    merging_tokenizer,
    model_input,
    random_prompts,
    shared_policy,
    tiny_codec,
    tiny_policy,
)
from verl.agents.collector import DataCollector
from verl.config import load_config
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.row_layouts import DecodeLayout, RowLayout
from verl.rewards.functions import build_rewards
from verl.rollout.embedded import continuous_batch as embedded
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.sampling_types import Completion, SamplingParams
from verl.utils.tokens import TextCodec

PROMPTS = random_prompts(
    [3, 50, 1, 9, 9, 2]
)  # with its answer the longest outgrows the first block of the cache
ENDS = tuple(
    range(20, 32)
)  # so many ids that answers end at different lengths, and waiting ones take their slots


def engine_of(policy: PolicyModel, *, max_slots: int = 4) -> EmbeddedEngine:
    return EmbeddedEngine(policy, tiny_codec(), max_slots=max_slots)


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in groups]


def logprob_differences(policy: PolicyModel, temperature: float) -> torch.Tensor:
    """|sampler - trainer| of every token of 18 answers in 5 slots."""
    params = [
        SamplingParams(temperature, max_tokens=24, n=3, stop_ids=ENDS, seed=i) for i in range(len(PROMPTS))
    ]
    groups = engine_of(policy, max_slots=5).generate(PROMPTS, params)
    rows = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    assert len({len(c.token_ids) for _, c in rows}) > 5
    inputs = model_input([prompt for prompt, _ in rows], [c.token_ids for _, c in rows])
    with torch.no_grad(), policy.forward_mode():
        trainer = policy.token_logprobs(inputs, temperature=temperature, chunk=100)[0]
    return (torch.tensor([logprob for _, c in rows for logprob in c.logprobs]) - trainer).abs()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_and_the_trainer_have_the_same_logprobs(family, temperature):
    differences = logprob_differences(shared_policy(family), temperature)
    # The delta rule is computed in chunks in training and token by token here, and a norm of small values
    # enlarges the rounding of single tokens.
    assert differences.max() < (1e-4 if family == "qwen3_next" else 1e-5)
    assert differences.mean() < 2e-6


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.02), ("fp16", 0.003)])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_in_a_lower_precision_they_agree_as_far_as_it_goes(family, precision, error):
    assert logprob_differences(tiny_policy(family, precision), 1.0).mean() < error


def test_answers_are_the_same_with_any_number_of_slots():
    policy = shared_policy("gemma3")
    params = [SamplingParams(max_tokens=16, n=3, stop_ids=ENDS, seed=i) for i in range(len(PROMPTS))]
    answers = [
        ids_of(engine_of(policy, max_slots=slots).generate(PROMPTS, params)) for slots in (1, 2, 5, 100)
    ]
    assert answers[0] == answers[1] == answers[2] == answers[3]


def counted(policy: PolicyModel, generate: Callable[[], object]) -> tuple[list[int], int]:
    """Tokens of each prefill of a call, and the number of its decoded tokens."""
    prefills, decoded, hidden = [], 0, policy.hidden_states

    def counting(input_ids, position_ids, layout):
        nonlocal decoded
        if isinstance(layout, DecodeLayout):
            decoded += input_ids.numel()
        else:
            prefills.append(input_ids.numel())
        return hidden(input_ids, position_ids, layout)

    policy.hidden_states = counting
    generate()
    return prefills, decoded


def test_the_prompt_of_a_group_is_computed_once():
    policy = tiny_policy()
    params = [SamplingParams(max_tokens=5, n=4, stop_ids=())] * 2
    engine = engine_of(policy, max_slots=8)
    # The first token of an answer comes from the prefill.
    assert counted(policy, lambda: engine.generate([[9] * 30, [8] * 11], params)) == ([41], 2 * 4 * 4)


def test_a_group_larger_than_the_slots_is_computed_once_per_part():
    policy = tiny_policy()
    engine = engine_of(policy, max_slots=4)
    assert counted(policy, lambda: engine.generate([[9] * 30], [SamplingParams(max_tokens=5, n=10)]))[0] == [
        30,
        30,
        30,
    ]


def test_a_prefill_takes_no_more_groups_than_its_tokens_allow(monkeypatch):
    monkeypatch.setattr(embedded, "_PREFILL_TOKENS", 20)
    policy = tiny_policy()
    engine = engine_of(policy, max_slots=10)
    assert counted(policy, lambda: engine.generate([[9] * 15] * 5, [SamplingParams(max_tokens=2)] * 5))[
        0
    ] == [30, 30, 15]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_are_the_trainers_own_before_and_after(precision):
    policy = tiny_policy("qwen3", precision)
    before = [(p.data_ptr(), p.dtype, p._version, p.requires_grad) for p in policy.parameters()]
    engine_of(policy).generate(PROMPTS, [SamplingParams(max_tokens=4)] * len(PROMPTS))
    assert [(p.data_ptr(), p.dtype, p._version, p.requires_grad) for p in policy.parameters()] == before
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_in_place_is_used_by_the_next_generation(precision):
    policy, other = tiny_policy(precision=precision), tiny_policy(precision=precision, seed=1)
    engine, params = engine_of(policy), [SamplingParams(max_tokens=8)] * len(PROMPTS)
    first = ids_of(engine.generate(PROMPTS, params))
    with torch.no_grad():
        for parameter, new in zip(policy.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)
    assert (
        ids_of(engine.generate(PROMPTS, params))
        == ids_of(engine_of(other).generate(PROMPTS, params))
        != first
    )


def test_the_model_is_left_as_it_was_even_after_an_error():
    policy = tiny_policy()
    implementation = policy.transformer.config._attn_implementation
    policy.enable_gradient_checkpointing()
    policy.train()
    engine = engine_of(policy)
    engine.generate(PROMPTS[:1], [SamplingParams(max_tokens=3)])
    with torch.no_grad():
        policy.transformer.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RuntimeError):
        engine.generate(PROMPTS[:1], [SamplingParams(max_tokens=3)])
    assert policy.training and policy.transformer.base_model.training
    assert all(layer.training for layer in policy.transformer.base_model.layers)
    assert policy.transformer.config._attn_implementation == implementation


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stop_the_generation(temperature):
    policy = tiny_policy(precision="fp16")
    with torch.no_grad():
        policy.transformer.get_input_embeddings().weight.mul_(1e9)  # beyond the largest number of fp16
    with pytest.raises(
        RuntimeError,
        match="logits are not finite at token 0 of an answer to prompt 0; it computes in fp16: use",
    ):
        engine_of(policy).generate(PROMPTS, [SamplingParams(temperature)] * len(PROMPTS))


def cycling_policy(vocabulary: int) -> PolicyModel:
    """Samples token i + 1 after token i, and the first after the last: the layers add nothing, the head is a
    permutation.
    """
    policy = tiny_policy(
        "llama", vocab_size=vocabulary, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        policy.transformer.get_input_embeddings().weight.copy_(torch.eye(vocabulary, 32))
        policy.transformer.get_output_embeddings().weight.copy_(torch.eye(vocabulary, 32).roll(1, 0))
    return policy


def test_a_stop_text_of_many_bytes_is_found():
    # One token per byte of the character: it takes 16 tokens to spell a stop text of 4 characters.
    pieces = list("ðŁĺĢ")  # how byte-level tokenizers spell F0 9F 98 80
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoders.ByteLevel()
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    engine = EmbeddedEngine(cycling_policy(4), codec)
    ((completion,),) = engine.generate([[3]], [SamplingParams(0, max_tokens=40, stop=("😀" * 4,))])
    assert completion.token_ids == [0, 1, 2, 3] * 4 and completion.finish_reason == "stop"
    assert codec.decode(completion.token_ids) == "😀" * 4


def test_the_rows_to_train_on_hold_the_sampled_ids_not_those_of_their_text():
    codec = TextCodec(merging_tokenizer())
    # A narrow spread of weights: all four tokens are about as likely.
    policy = tiny_policy(
        vocab_size=4, pad_token_id=None, bos_token_id=None, eos_token_id=0, initializer_range=0.02
    )
    config = load_config("grpo", ["sampling.max_tokens=12"])
    engine = EmbeddedEngine(policy, codec)
    rewards = build_rewards(config.rewards, lambda prompt, response: 1.0)
    collected = DataCollector(engine, codec, rewards, config).collect(["ab"], samples=32)
    assert any(codec.encode(t.text) != [i for i in t.response_ids if i] for t in collected.trajectories)
    own = engine.generate([[3]], [SamplingParams(max_tokens=12, n=32, seed=config.seed << 32)])[0]
    rows = collected.rows.ragged("response_ids")
    assert [rows.row(i).tolist() for i in range(32)] == [c.token_ids for c in own]
    inputs = model_input([[3]] * 32, [c.token_ids for c in own])
    with torch.no_grad(), policy.forward_mode():
        trainer = policy.token_logprobs(inputs, temperature=1.0, chunk=100)[0]
    torch.testing.assert_close(collected.rows.ragged("rollout_logprobs").values, trainer, atol=1e-5, rtol=0)


def test_layouts_of_a_prefill_name_the_slots_of_its_groups():
    policy = tiny_policy()
    layouts, hidden = [], policy.hidden_states

    def noting(input_ids, position_ids, layout):
        layouts.append(layout)
        return hidden(input_ids, position_ids, layout)

    policy.hidden_states = noting
    engine_of(policy, max_slots=10).generate(
        [[9] * 5, [8] * 3], [SamplingParams(max_tokens=1, n=3), SamplingParams(max_tokens=1, n=2)]
    )
    (layout,) = layouts
    assert isinstance(layout, RowLayout) and layout.lengths == [5, 3] and layout.slots.tolist() == [0, 3]


def test_rows_of_the_head_beyond_the_tokenizer_are_never_sampled():
    policy = tiny_policy(vocab_size=160)
    with torch.no_grad():  # far more likely than any token
        policy.transformer.get_input_embeddings().weight[100:] *= 10
    prompts = random_prompts([3, 5])
    params = [SamplingParams(max_tokens=20, n=8, stop_ids=ENDS, seed=i) for i in range(2)]
    groups = engine_of(policy).generate(prompts, params)
    assert max(token for group in groups for c in group for token in c.token_ids) < 100
    assert policy.num_ids is None
    policy.num_ids = 100  # as in a run
    answers = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    inputs = model_input([p for p, _ in answers], [c.token_ids for _, c in answers])
    with torch.no_grad(), policy.forward_mode():
        logprobs, entropy = policy.token_logprobs(inputs, temperature=1.0, chunk=64)
    sampled = torch.tensor([logprob for _, c in answers for logprob in c.logprobs])
    assert (sampled - logprobs).abs().max() < 1e-5 and entropy.isfinite().all()
