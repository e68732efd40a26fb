"""Tests of attention by rows against the models' own forward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import FAMILIES, WINDOW, model_input, random_prompts, shared_policy
from verl.engines.hf.attention import IMPLEMENTATION, use_attention
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.row_layouts import DecodeLayout, KVCache, RowLayout

PROMPTS = random_prompts([3, 9, 1, 6])
RESPONSES = random_prompts([8, 2, 13, 5], seed=1)
ROWS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def own_logits(policy: PolicyModel, row: list[int]) -> Tensor:
    """[S, V] of the family's own code; eager, as PyTorch's attention leaves out the cap of Gemma 2."""
    with torch.no_grad(), use_attention(policy.transformer, "eager"):
        return policy.transformer(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_row_are_those_of_the_models_own_forward(family, packed):
    policy = shared_policy(family)
    inputs = model_input(PROMPTS, RESPONSES, packed=packed)
    with torch.no_grad(), policy.forward_mode():
        states = policy.hidden_states(inputs.input_ids, inputs.position_ids, RowLayout.from_inputs(inputs))
        rows = (
            states[0].split(inputs.lengths)
            if packed
            else [s[:n] for s, n in zip(states, inputs.lengths, strict=True)]
        )
        ours = [policy.logits(row) for row in rows]
    for row, logits in zip(ROWS, ours, strict=True):
        torch.testing.assert_close(logits, own_logits(policy, row)[:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_token_by_token_gives_the_logits_of_the_whole_rows(family):
    policy = shared_policy(family)
    rows = [row[:10] for row in ROWS if len(row) >= 10]
    cache, lengths = KVCache(len(rows)), [1 + i for i in range(len(rows))]
    cache.reserve(10)
    ids = torch.tensor([[token for row, n in zip(rows, lengths, strict=True) for token in row[:n]]])
    places = torch.tensor([[i for n in lengths for i in range(n)]])
    with torch.no_grad(), policy.forward_mode():
        policy.hidden_states(
            ids, places, RowLayout(lengths, True, ids.device, cache, torch.arange(len(rows)))
        )
        for step in range(10 - max(lengths)):
            positions = torch.tensor(lengths) + step
            tokens = torch.tensor([[row[p]] for row, p in zip(rows, positions, strict=True)])
            states = policy.hidden_states(
                tokens, positions[:, None], DecodeLayout(cache, positions, int(positions.max()) + 1)
            )
            own = torch.stack([own_logits(policy, row)[p] for row, p in zip(rows, positions, strict=True)])
            torch.testing.assert_close(policy.logits(states[:, 0]), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_hides_what_lies_before_it(family):
    policy = shared_policy(family)
    row, changed = [9] * 30, [50, *[9] * 29]
    inputs = [model_input([r[:1]], [r[1:]]) for r in (row, changed)]
    with torch.no_grad(), policy.forward_mode():
        a, b = (
            policy.hidden_states(i.input_ids, i.position_ids, RowLayout.from_inputs(i))[0] for i in inputs
        )
    # Two windowed layers; in Gemma 2 the second sees all. The last of the 30 tokens predicts nothing and is
    # not read.
    reach = 2 * (WINDOW - 1) + 1 if family == "mistral" else 29
    assert (a != b).any(-1).nonzero().squeeze(1).tolist() == list(range(reach))


def test_rows_of_one_length_need_no_padding_and_give_the_same():
    policy = shared_policy("qwen2")
    row, other = ROWS[0], ROWS[1]
    assert len(row) == len(other)
    packed, padded = (
        model_input([row[:2], other[:2]], [row[2:], other[2:]], packed=p) for p in (True, False)
    )
    assert RowLayout.from_inputs(packed).uniform
    with torch.no_grad(), policy.forward_mode():
        torch.testing.assert_close(policy.predictor_states(packed), policy.predictor_states(padded))


def test_a_prompt_that_rows_share_has_the_gradient_of_all_of_them():
    policy = shared_policy("qwen2")
    prompts, responses = (
        [[5, 6, 7], [8], [5, 6, 7], [5, 6, 7]],
        [[9, 10], [11, 12, 13], [14], [15, 16, 17, 18]],
    )
    gradients = []
    for packed in (True, False):
        policy.zero_grad()
        inputs = model_input(prompts, responses, packed=packed)
        with policy.forward_mode():
            policy.token_logprobs(inputs, temperature=1.0, chunk=100)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    assert inputs.input_ids.numel() == 4 * 6
    shared, alone = (torch.cat([g.flatten() for g in gradient]) for gradient in gradients)
    assert (shared - alone).norm() < 1e-6 * alone.norm()


def test_outside_the_block_the_model_attends_as_before_even_after_an_error():
    transformer = shared_policy("gemma3").transformer
    before = transformer.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), use_attention(transformer):
        assert transformer.config._attn_implementation == IMPLEMENTATION
        raise RuntimeError("stop")
    assert transformer.config._attn_implementation == before != IMPLEMENTATION


def test_the_cache_keeps_its_rows_when_it_grows():
    cache, like = KVCache(3), torch.zeros(1, 2, 1, 4)
    cache.reserve(5)
    keys, values = cache.layer(0, like, like)
    keys[:, :, :5], values[:, :, :5] = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    cache.reserve(KVCache.GROWTH + 1)
    grown_keys, grown_values = cache.layer(0, like, like)
    assert grown_keys.shape == grown_values.shape == (3, 2, 2 * KVCache.GROWTH, 4)
    assert torch.equal(grown_keys[:, :, :5], keys[:, :, :5]) and torch.equal(
        grown_values[:, :, :5], values[:, :, :5]
    )


def test_a_finished_row_of_the_cache_is_overwritten_by_another():
    cache, like = KVCache(3), torch.zeros(1, 1, 1, 2)
    cache.reserve(4)
    keys, values = cache.layer(7, like, like)
    keys[:], values[:] = torch.arange(3.0).view(3, 1, 1, 1), -torch.arange(3.0).view(3, 1, 1, 1)
    cache.copy(torch.tensor([2]), torch.tensor([0]), 3)
    assert keys[:, 0, :4, 0].tolist() == [[2, 2, 2, 0], [1, 1, 1, 1], [2, 2, 2, 2]]
    assert values[0, 0, :4, 0].tolist() == [-2, -2, -2, 0]


def test_keys_and_values_may_have_different_sizes_and_take_the_dtype_of_the_values():
    keys, values = KVCache(2).layer(0, torch.zeros(1, 3, 1, 6), torch.zeros(1, 3, 1, 4, dtype=torch.bfloat16))
    assert (keys.shape[3], values.shape[3]) == (6, 4)
    assert keys.dtype == values.dtype == torch.bfloat16
