"""Lets torchvision be imported beside a PyTorch without CUDA, whose compiled part cannot load: its operators
are declared before.

Transforms and pictures work then, the compiled operators (nms and the like) do not. Does nothing until
torchvision is imported; a line `import torchvision_cpu_fix` in a .pth file of site-packages brings it into
every process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a library is undone when it is collected


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch  # not before: this runs at the start of every process

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                library.define(operator)
            _kept.append(library)
        return importlib.machinery.PathFinder.find_spec(name, path, target)


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _Finder())
