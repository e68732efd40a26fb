"""An engine of a user whose rank 2 dies in its third switch to the generation layout, for tests, as long as a
file is there.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from verl.config.fields import Choice
from verl.config.placement import ParallelConfig
from verl.engines.base import ForwardEngine
from verl.engines.fsdp import FSDPEngine, sharded_engine


class DyingEngine(FSDPEngine):
    when: Path
    # Two when the generation layout is made, then one for each switch.
    calls = 0

    @override
    def local_tensors(self) -> dict[str, Tensor]:
        tensors = super().local_tensors()
        self.calls += 1
        if self.when.exists() and dist.get_rank() == 2 and self.calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensors


def engine(source: str, kind: Any, role: Any, parallel: ParallelConfig, **given: Any) -> ForwardEngine:
    made = sharded_engine(
        source, kind, role, parallel.model_copy(update={"engine": Choice(name="fsdp")}), **given
    )
    made.__class__ = DyingEngine
    made.when = Path(parallel.engine.options["when"])
    return made
