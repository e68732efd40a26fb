"""Tests of recurrent layers that read rows: copies, states in generation, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engines.hf.families import MODELS
from tests.tiny import model_input, random_prompts, tiny_codec, tiny_policy, tiny_transformer
from verl.config.placement import ParallelConfig
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.recurrent import LayerState, recurrent_layers
from verl.engines.hf.row_layouts import DecodeLayout, KVCache, RowLayout, use_layout
from verl.engines.tensor_parallel import check_parallel_sizes
from verl.rollout.embedded.continuous_batch import ContinuousBatch
from verl.utils.sampling_types import SamplingParams

PROMPTS = random_prompts([4, 7])


def test_a_copy_of_a_model_computes_with_its_own_weights():
    policy = tiny_policy("qwen3_next")
    other = PolicyModel(copy.deepcopy(policy.transformer), "fp32")
    inputs = model_input(PROMPTS, PROMPTS)

    def logprobs(model: PolicyModel) -> torch.Tensor:
        with torch.no_grad(), model.forward_mode():
            return model.token_logprobs(inputs, temperature=1.0, chunk=100)[0]

    before = logprobs(policy)
    (layer,) = recurrent_layers(other.transformer)
    with torch.no_grad():
        layer.get_parameter("out_proj.weight").zero_()
    assert torch.equal(logprobs(policy), before)
    assert (logprobs(other) - before).abs().max() > 0.01


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "falcon_h1"])
def test_states_are_computed_again_after_a_change_of_the_weights(family):
    policy = tiny_policy(family, **MODELS[family])
    batch = ContinuousBatch(policy, tiny_codec(), slots=4, first_slots=1)
    for number, prompt in enumerate(PROMPTS):
        batch.add(number, prompt, SamplingParams(n=2, max_tokens=12, seed=number, temperature=1.0))
    policy.num_ids = tiny_codec().num_ids
    with policy.forward_mode():
        for _ in range(4):
            batch.step()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.9)
        batch.recompute_cache()
        rows = batch.step()
    inputs = model_input([row.prompt for row in rows], [row.tokens for row in rows])
    with torch.no_grad(), policy.forward_mode():
        logprobs = policy.token_logprobs(inputs, temperature=1.0, chunk=100)[0]
    last = torch.tensor([len(row.tokens) for row in rows]).cumsum(0) - 1
    assert len(rows) > 2
    torch.testing.assert_close(
        logprobs[last], torch.tensor([row.logprobs[-1] for row in rows]), atol=1e-5, rtol=0
    )


def test_a_slot_that_is_used_again_has_nothing_of_its_last_row():
    policy = tiny_policy("mamba2", **MODELS["mamba2"])
    ids = torch.tensor([PROMPTS[0]])
    places = torch.arange(ids.shape[1])[None]
    caches = [KVCache(1), KVCache(1)]
    with torch.no_grad(), policy.forward_mode():
        for cache, times in zip(caches, (1, 2), strict=True):
            for _ in range(times):
                layout = RowLayout([ids.shape[1]], True, ids.device, cache, torch.tensor([0]))
                policy.hidden_states(ids, places, layout)
                states = cache.layer_states(0)
                first = {key: state.clone() for key, state in states.items()}
                policy.hidden_states(ids[:, :1], places[:, :1], DecodeLayout(cache, torch.tensor([4]), 5))
                assert all((states[key] != first[key]).any() for key in states)
    for a, b in zip(caches[0].layer_states(0).values(), caches[1].layer_states(0).values(), strict=True):
        assert torch.equal(a, b)


def test_ranks_that_share_a_sequence_are_refused():
    transformer = tiny_transformer("qwen3_next")
    with pytest.raises(ValueError, match="need sequence=1 for 'qwen3_next'"):
        check_parallel_sizes(transformer, ParallelConfig(sequence=2), packing=True)


def test_limits_of_time_steps_that_decoding_cannot_follow_are_refused():
    policy = tiny_policy("falcon_h1", **MODELS["falcon_h1"], time_step_limit=(0.1, 10.0))
    with pytest.raises(ValueError, match=r"need time_step_limit \(0.0, inf\) in config.json for decoding"):
        policy.check_forward()


def test_without_a_layout_a_layer_is_that_of_its_family():
    policy = tiny_policy("lfm2", **MODELS["lfm2"])
    (layer,) = recurrent_layers(policy.transformer)
    states = torch.randn(2, 5, 32)
    own = type(layer).forward(layer, states)
    assert torch.equal(layer(states), own)
    packed = states.flatten(0, 1)[None]
    with use_layout(RowLayout([5, 5], True, states.device)):
        torch.testing.assert_close(layer(packed), own.flatten(0, 1)[None])


def test_states_are_told_by_kind_and_number():
    layer = LayerState(2)
    layer.update_conv_state(torch.ones(1, 3, 2), 1, conv_kernel_size=4)
    layer.update_recurrent_state(torch.ones(1, 2, 2), 0)
    shapes = {key: tuple(state.shape) for key, state in layer.states().items()}
    assert shapes == {("conv", 1): (1, 3, 4), ("recurrent", 0): (1, 2, 2)}
