"""The limit of a step: by hand for a tiny shape, and against limits worked out apart for known models."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, Qwen2Config, Qwen3MoeConfig

from verl.planner.step_time import ModelShape, StepWork, forward_flops, rollout_seconds, step_limit
from verl.utils.device import MachineSpeed

TINY = ModelShape(layers=1, hidden=4, q_heads=2, kv_heads=1, head_dim=2, intermediate=8, vocab=10)
QWEN25_05B = ModelShape(
    layers=24, hidden=896, q_heads=14, kv_heads=2, head_dim=64, intermediate=4864, vocab=151936
)
QWEN25_15B = ModelShape(
    layers=28, hidden=1536, q_heads=12, kv_heads=2, head_dim=128, intermediate=8960, vocab=151936
)
QWEN3_4B = ModelShape(
    layers=36, hidden=2560, q_heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocab=151936
)
H200 = MachineSpeed(flops_per_s=790e12, bytes_per_s=4.3e12)


def work(prompts: list[int], responses: list[int], **changes: int) -> StepWork:
    numbers = {"num_prompts": 1, "updates": 1, "max_slots": 1024, "bytes_per_weight": 4} | changes
    return StepWork(torch.tensor(prompts), torch.tensor(responses), **numbers)


def test_weights_of_a_tiny_shape_by_hand():
    assert TINY.body_weights == 4 * 4 * 2 + 4 * 4 + 3 * 4 * 8 == 144  # q, k, v; output; MLP.
    assert TINY.head_weights == 40
    assert TINY.matmul_weights == TINY.stored_weights == 184
    assert TINY.kv_values_per_token == 4


def test_forward_operations_of_a_tiny_shape_by_hand():
    flops = forward_flops(TINY, torch.tensor([3, 1]), torch.tensor([2, 0]))
    assert flops.tolist() == [2 * 144 * 5 + 2 * 40 * 2 + 2 * 2 * 2 * 25, 2 * 144 + 2 * 2 * 2]


def test_phases_of_a_tiny_step_by_hand():
    limit = step_limit(
        TINY,
        work([3, 3], [2, 4], num_prompts=1, updates=5, epochs=2),
        MachineSpeed(flops_per_s=10.0, bytes_per_s=1.0),
    )
    cache_reads = 3 * 2 + 2 + 3 * 4 + 8
    assert limit.prefill_s == pytest.approx((2 * 144 * 3 + 8 * 9) / 10)
    assert limit.generate_s == pytest.approx(4 * (184 * 4 + 4 * cache_reads))
    assert limit.train_s == pytest.approx(2 * 3 * (2 * 144 * 12 + 2 * 40 * 6 + 8 * (25 + 49)) / 10)
    assert limit.optimizer_s == pytest.approx(5 * 28 * 184)
    assert limit.total_s == pytest.approx(
        limit.prefill_s + limit.generate_s + limit.train_s + limit.optimizer_s
    )


def test_fewer_slots_read_the_matrices_more_often():
    slow_memory = MachineSpeed(flops_per_s=1e30, bytes_per_s=1.0)
    all_at_once, one_by_one = (
        rollout_seconds(TINY, work([1] * 4, [8] * 4, max_slots=slots), slow_memory) for slots in (4, 1)
    )
    assert one_by_one - all_at_once == pytest.approx(4 * 184 * (32 - 8))


def test_generation_is_bound_by_arithmetic_when_memory_is_fast():
    seconds = rollout_seconds(TINY, work([1], [2]), MachineSpeed(flops_per_s=1.0, bytes_per_s=1e30))
    assert seconds == pytest.approx(2 * 184 * 2 + 4 * 2 * 2 * (1 * 2 + 2))


def test_a_16_bit_copy_of_the_weights_is_written_by_the_optimizer_too():
    limit = step_limit(
        TINY, work([1], [1], bytes_per_weight=2), MachineSpeed(flops_per_s=1.0, bytes_per_s=1.0)
    )
    assert limit.optimizer_s == pytest.approx(30 * 184)


@pytest.mark.parametrize(
    ("shape", "prompt", "response", "generate_s", "train_s", "total_s"),
    [
        (QWEN25_05B, 128, 256, 0.34, 1.36, 1.73),
        (QWEN25_05B, 128, 512, 0.69, 2.39, 3.12),
        (QWEN25_05B, 256, 2048, 8.15, 9.47, 17.7),
        (QWEN25_15B, 128, 512, 2.09, 7.59, 9.78),
        (QWEN3_4B, 128, 512, 7.88, 20.1, 28.3),
    ],
)
def test_limits_on_an_h200_agree_with_those_worked_out_apart(
    shape, prompt, response, generate_s, train_s, total_s
):
    step = work([prompt] * 1024, [response] * 1024, num_prompts=128, updates=4, bytes_per_weight=2)
    limit = step_limit(shape, step, H200)
    assert limit.generate_s == pytest.approx(generate_s, rel=0.02)
    assert limit.train_s == pytest.approx(train_s, rel=0.02)
    assert limit.total_s == pytest.approx(total_s, rel=0.01)


def test_the_shape_is_read_from_a_configuration():
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2Config(
        num_hidden_layers=24, hidden_size=896, intermediate_size=4864, tie_word_embeddings=True, **heads
    )
    assert ModelShape.from_hf_config(config) == QWEN25_05B


def test_untied_embeddings_are_stored_but_cost_no_arithmetic():
    shape = ModelShape.from_hf_config(Qwen2Config(tie_word_embeddings=False))
    assert shape.stored_weights - shape.matmul_weights == 151936 * 4096


@pytest.mark.parametrize(
    ("config", "reason"),
    [(Qwen3MoeConfig(), "experts"), (Gemma3TextConfig(), "sliding"), (GPT2Config(), "intermediate_size")],
)
def test_a_model_that_the_formulas_do_not_cover_is_refused(config, reason):
    with pytest.raises(ValueError, match=f"need a dense decoder .*{reason}"):
        ModelShape.from_hf_config(config)


@pytest.mark.parametrize(
    ("prompts", "responses", "changes"),
    [([1, 2], [1], {}), ([], [], {}), ([1], [1], {"num_prompts": 2}), ([1], [1], {"max_slots": 0})],
)
def test_impossible_work_is_refused(prompts, responses, changes):
    with pytest.raises(ValueError, match="need "):
        work(prompts, responses, **changes)
