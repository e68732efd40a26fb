"""All questions about hardware: the device, its precisions, memory, speed and random states."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# From malloc.h, https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device to train on: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Raises:
        ValueError: cuda without a GPU that PyTorch sees, or another name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"need device auto, cpu or cuda, got {name!r}")
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        remedy = (
            "install a build of PyTorch for CUDA"
            if torch.version.cuda is None
            else "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )
        raise ValueError(
            f"need a GPU for device cuda, but PyTorch {torch.__version__} sees none; {remedy}, "
            "or set device=cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and present) else "cpu")


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks, so that activations do not fault in new pages each time.

    By default glibc maps and unmaps every block above some MiB, which takes about a tenth of a training step
    on a CPU. Blocks above 24 MiB, such as chunks of logits, are still unmapped: kept, they would tear the
    heap. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(_M_MMAP_THRESHOLD, 24 << 20)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Context in which matrix products run in `precision` (fp32, bf16 or fp16); weights keep their dtype.

    Raises:
        ValueError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"need a precision of {', '.join(PRECISIONS)}, got {precision!r}")
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=PRECISIONS[precision])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Memory in bytes: `used` now, `peak` since the start, `total` of the device.

    On a GPU the memory of this process's tensors, on a CPU the resident memory of the whole process.
    """
    if device.type == "cuda":
        used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        used, peak = _process_memory()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"used": float(used), "peak": float(peak), "total": float(total)}


def _process_memory() -> tuple[int, int]:
    """Resident bytes of this process: current and peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        # Outside Linux the standard library reports the peak only; macOS in bytes, others in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    lines = dict(
        line.split(":", 1)
        for line in status.read_text().splitlines()
        if line.startswith(("VmRSS:", "VmHWM:"))
    )
    used = int(lines["VmRSS"].split()[0]) * 1024
    return used, int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else used


@dataclass(frozen=True)
class MachineSpeed:
    """Best rates of a device: operations of a large matrix product, bytes read and written by a copy."""

    flops_per_s: float
    bytes_per_s: float


def measure_speed(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    """Measure the best rates of matrix products in `dtype` and of a copy, in under half a second.

    A product of n x n matrices has 2 n^3 operations; a copy reads and writes each byte. The rates are
    measured, not the vendor's peaks, because limits derived from them should be reachable.
    """
    copied_bytes = 2**30 if device.type == "cuda" else 2**26  # larger than every cache
    source = torch.ones(copied_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = _best_seconds(lambda: target.copy_(source), device, num_runs=5)
    return MachineSpeed(flops_per_s=_matmul_flops_per_s(device, dtype), bytes_per_s=2 * copied_bytes / copy_s)


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate over growing matrices, until one product takes so long that its launch is negligible."""
    best = 0.0
    # Random numbers, because a GPU runs faster on constants; from a generator of their own, so that the
    # run's random states do not change.
    generator = torch.Generator(device).manual_seed(0)
    for side in (256, 512, 1024, 2048, 4096, 8192, 16384):
        matrix = torch.rand(side, side, generator=generator, device=device, dtype=dtype)
        product = torch.empty_like(matrix)
        took_s = _best_seconds(functools.partial(torch.mm, matrix, matrix, out=product), device, num_runs=3)
        best = max(best, 2 * side**3 / took_s)
        if took_s > 0.005:
            break
    return best


def _best_seconds(work: Callable[[], object], device: torch.device, *, num_runs: int) -> float:
    """Shortest time of several runs, after one warm-up run."""
    best_s = float("inf")
    for run in range(num_runs + 1):
        start = time.perf_counter()
        work()
        synchronize(device)
        if run > 0:
            best_s = min(best_s, time.perf_counter() - start)
    return best_s


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy accepts 32 bits only
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Random states of Python, NumPy and PyTorch, for `set_rng_state`.

    Only dicts, lists, numbers, texts and tensors, so that `torch.load(..., weights_only=True)` reads it.
    """
    version, words, gauss = random.getstate()
    # The legacy form is always this 5-tuple; the stubs of NumPy also allow a dict.
    kind, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    # Reading the states of a GPU that was never used would start CUDA in a run on the CPU.
    states_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": [int(key) for key in keys],
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached_gauss),
        },
        "torch": torch.get_rng_state(),
        "cuda": states_cuda,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore a result of `rng_state`; states of GPUs that this machine lacks are ignored."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = np.array(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
    # A checkpoint loaded onto a GPU has its states there, but PyTorch wants them on the CPU.
    torch.set_rng_state(state["torch"].cpu())
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), index)
