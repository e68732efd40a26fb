"""Device, precision, memory, speed and random states."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from verl.utils.device import (
    autocast,
    measure_speed,
    memory_bytes,
    pick_device,
    rng_state,
    seed_everything,
    set_rng_state,
)

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [
        random.gauss(0, 1),
        random.random(),
        float(np.random.randn()),
        float(np.random.rand()),
        float(torch.rand(())),
    ]


def test_auto_takes_what_is_there_and_cpu_is_taken_as_said():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU


def test_cuda_without_a_gpu_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees none; .* or set device=cpu"):
        pick_device("cuda")


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match="need device auto, cpu or cuda, got 'tpu'"):
        pick_device("tpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_run_in_the_precision_and_weights_keep_theirs(precision, dtype):
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, precision):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="got 'fp8'"):
        autocast(CPU, "fp8")


def test_memory_grows_by_what_is_allocated():
    before = memory_bytes(CPU)
    # Larger than what the C library keeps when it is freed.
    block = torch.ones(5 * 2**28, dtype=torch.uint8)
    after = memory_bytes(CPU)
    assert after["used"] - before["used"] > 0.9 * block.numel()
    assert after["used"] <= after["peak"] * 1.01 < after["total"]


def test_measured_speed_is_that_of_a_computer_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    speed = measure_speed(CPU, torch.float32)
    assert 1e8 < speed.flops_per_s < 1e14
    assert 1e8 < speed.bytes_per_s < 1e13
    assert torch.rand(()) == expected


def test_the_same_seed_gives_the_same_draws():
    seed_everything(2**32 + 5)
    first = draws()
    seed_everything(2**32 + 5)
    assert draws() == first
    seed_everything(2**32 + 6)
    assert draws() != first


def test_random_states_survive_a_file_that_holds_weights_only(tmp_path):
    seed_everything(1)
    draws()  # Leaves half of a pair of Gaussian draws in Python and in NumPy.
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draws() + draws()
    seed_everything(2)
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draws() + draws() == expected


def test_states_of_gpus_that_are_not_here_are_left_out():
    state = rng_state()
    expected = draws()
    set_rng_state(state | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)})
    assert draws() == expected


@pytest.mark.gpu
def test_a_gpu_is_found_measured_and_its_random_state_kept():
    device = pick_device("auto")
    assert measure_speed(device, torch.bfloat16).flops_per_s > measure_speed(CPU, torch.float32).flops_per_s
    assert memory_bytes(device)["total"] > 2**30
    seed_everything(1)
    state, expected = rng_state(), torch.rand(4, device=device)
    set_rng_state(state)
    torch.testing.assert_close(torch.rand(4, device=device), expected, atol=0, rtol=0)
