"""The one place that asks about hardware: which device, its arithmetic, memory and speed, and the random
states.
"""

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
    """The device to train on: `auto` takes a GPU where there is one, `cpu` and `cuda` are taken as said.

    Raises:
        ValueError: cuda is asked for and PyTorch sees no GPU, or the name is none of the three.
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
            f"need a GPU for device cuda, but PyTorch {torch.__version__} sees none; {remedy}, or set device=cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and present) else "cpu")


def keep_freed_memory() -> None:
    """Lets the C library keep large blocks that were freed, so that activations do not fault in fresh pages
    each time.

    By default glibc maps every block above some MiB anew, which takes about a tenth of a training step on a
    CPU. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        libc.mallopt(parameter, 1 << 30)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `precision` (fp32, bf16 or fp16); weights keep their own.

    Raises:
        ValueError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"need a precision of {', '.join(PRECISIONS)}, got {precision!r}")
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=PRECISIONS[precision])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything that was queued; on a CPU nothing ever is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Memory in bytes: `used` now, `peak` since the start, `total` of the device.

    On a GPU that of tensors of this process, on a CPU that of the whole process (resident).
    """
    if device.type == "cuda":
        used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        used, peak = _process_memory()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"used": float(used), "peak": float(peak), "total": float(total)}


def _process_memory() -> tuple[int, int]:
    """Resident bytes of this process, now and at most."""
    status = Path("/proc/self/status")
    if not status.exists():
        # Outside Linux the standard library knows the peak only; macOS counts it in bytes, others in KiB.
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
    """What a device reaches in the best case: operations of a large matrix product, bytes read and written by
    a large copy.
    """

    flops_per_s: float
    bytes_per_s: float


def measure_speed(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    """Times large matrix products in `dtype` and a large copy, each at its best; takes under half a second.

    A product of n x n matrices is 2 n^3 operations, a copy reads and writes each byte. Measured, not the
    vendor's peak, because limits that are derived from it should be reachable.
    """
    copied_bytes = 2**30 if device.type == "cuda" else 2**26  # Beyond every cache.
    source = torch.ones(copied_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = _best_seconds(lambda: target.copy_(source), device, num_runs=5)
    return MachineSpeed(flops_per_s=_matmul_flops_per_s(device, dtype), bytes_per_s=2 * copied_bytes / copy_s)


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate over growing matrices, until one product takes long enough that starting it does not count."""
    best = 0.0
    # Random numbers, as a GPU runs faster on constant ones; from their own generator, to leave the run's
    # states alone.
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
    """Shortest time of several runs, after one to warm up."""
    best_s = float("inf")
    for run in range(num_runs + 1):
        start = time.perf_counter()
        work()
        synchronize(device)
        if run > 0:
            best_s = min(best_s, time.perf_counter() - start)
    return best_s


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits.
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The random states of Python, NumPy and PyTorch, for `set_rng_state`.

    Only dicts, lists, numbers, texts and tensors, so that `torch.load(..., weights_only=True)` reads it back.
    """
    version, words, gauss = random.getstate()
    # The legacy form is always this 5-tuple; the stubs of NumPy also allow a dict.
    kind, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    # Asking a GPU that was never used would start CUDA in a run on the CPU.
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
    """Goes back to a state of `rng_state`; states of GPUs that are not here are left out."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = np.array(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
    # A checkpoint that was loaded onto a GPU brings its states along, and they belong on the CPU.
    torch.set_rng_state(state["torch"].cpu())
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), index)
