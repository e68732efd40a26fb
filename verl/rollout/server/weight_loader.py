"""Weights into a model, part by part, as an engine takes them: what came, what is missing, and which weights
they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from verl.engines.hf.pretrained import load_language_model
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.layout import Bounds, full_bounds
from verl.weight_sync.receiver import WeightReceiver
from verl.weight_sync.shard_tracking import shard_key, slices_of
from verl.weight_sync.shared_memory import dtype_of
from verl.weight_sync.types import TensorInfo, WeightChunk

# Names in PEFT's files: base_model.model.NAME.lora_A.weight
_PEFT_PREFIX = "base_model.model."


class WeightLoader:
    """Takes updates into the weights of a model, in place.

    Between `begin` and an `end` that succeeds the weights are neither the old nor the new ones.

    Attributes:
        is_torn: whether they are.
        is_open: an update was begun and not ended.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.is_torn = self.is_open = False
        self._own: dict[str, Tensor] = dict(transformer.state_dict(keep_vars=True))
        # Digests by the key of a tensor or of a part of it, and the names of the tensors.
        self._taken: dict[str, int] = {}
        self._names: set[str] = set()
        # Parts by which a tensor that came directly counts.
        self._marks: dict[str, list[Bounds]] = {}
        # The model copies what comes into its own weights.
        self._arrivals = WeightReceiver(None, copies_tensors=False)
        # As they were before low-rank additions were added, of the matrices that have some.
        self._without_additions: dict[str, Tensor] = {}

    def join_group(
        self, address: str, port: int, rank: int, *, num_ranks: int, backend: str, timeout_s: float
    ) -> None:
        """Joins the group over which parts come, in place of one before."""
        self._arrivals.join_group(
            address, port, rank=rank, num_ranks=num_ranks, backend=backend, timeout_s=timeout_s
        )

    def begin(self) -> None:
        """Forgets what was taken before, whether it was ended or not."""
        self._taken, self._names, self._marks = {}, set(), {}
        self.is_open = self.is_torn = True

    def received(self, part: WeightChunk) -> list[tuple[TensorInfo, Tensor]]:
        """The tensors of a part, the weights left alone; waits for the sender where they come over a group.

        Raises:
            ValueError: no update was begun.
            RuntimeError: bytes are missing, there is no group, or it failed.
        """
        if not self.is_open:
            raise ValueError("need begin_update before weights are loaded")
        if part.transport == "disk":
            return list(_from_folder(Path(part.location["folder"]), part.tensors, self._own))
        if part.transport not in ("shm", "group", "direct", "ipc"):
            raise ValueError(f"need weights via shm, disk, group or direct, got {part.transport!r}")
        found = []
        for info, parts, marks in (arrived for batch in self._arrivals.received(part) for arrived in batch):
            ((_, tensor),) = parts
            found.append((info, tensor))
            self._marks[info.name] = marks
        return found

    @torch.no_grad()
    def take(self, tensors: Sequence[tuple[TensorInfo, Tensor]]) -> None:
        """Puts tensors of the update into the model.

        Raises:
            ValueError: one that the model does not have, or of another shape.
        """
        for info, tensor in tensors:
            own = self._own.get(info.name)
            if own is None or tuple(own.shape) != tuple(tensor.shape):
                found = "no such tensor" if own is None else f"one of shape {tuple(own.shape)}"
                raise ValueError(
                    f"need tensors that the model has, got {info.name} of shape {tuple(tensor.shape)}; the model has {found}"
                )
            own.copy_(tensor)
            self._names.add(info.name)
            # Of what the model has now, in the dtype that was sent: a lossy copy would show.
            served = own.to(tensor.dtype)
            for bounds in self._marks.get(info.name) or [full_bounds(tuple(own.shape))]:
                self._taken[shard_key(info.name, bounds, shape=own.shape)] = digest(served[slices_of(bounds)])

    def end(self) -> str:
        """The fingerprint of what was taken.

        Raises:
            ValueError: tensors of the model were not sent, or no update was begun; the weights are torn then.
        """
        if not self.is_open:
            raise ValueError("need begin_update before end_update")
        self.is_open = False
        # Names of one storage, such as a tied head's, count as one. Buffers, which no optimizer changes, need
        # not be sent.
        covered = {self._own[name].data_ptr() for name in self._names}
        parameters = [
            (name, tensor)
            for name, tensor in self._own.items()
            if isinstance(tensor, nn.Parameter) and tensor.numel() > 0
        ]
        missing = [name for name, tensor in parameters if tensor.data_ptr() not in covered]
        if missing:
            raise ValueError(
                f"need all weights in an update, but {len(missing)} were not sent: {_some(missing)}"
            )
        self._without_additions = {}
        self.is_torn = False
        return fingerprint(self._taken)

    @torch.no_grad()
    def load_lora_adapter(self, folder: Path) -> str:
        """Adds low-rank additions in PEFT format to the weights, in place of those before; the fingerprint of
        their file.

        Raises:
            ValueError: they do not fit the model, or are of a kind that is not known here.
        """
        if self.is_torn:
            raise ValueError("need whole weights before additions; the last update was not completed")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if (
            config.get("use_dora")
            or config.get("use_rslora")
            or config.get("rank_pattern")
            or config.get("alpha_pattern")
        ):
            raise ValueError(
                "need plain low-rank additions of one rank, without DoRA, rank-stabilized scaling or patterns"
            )
        scaling = config["lora_alpha"] / config["r"]
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ups = {name: name.replace(".lora_A.", ".lora_B.") for name in tensors if ".lora_A." in name}
        targets = {name: name.removeprefix(_PEFT_PREFIX).replace(".lora_A.", ".") for name in ups}
        unknown = [name for name in tensors if name not in ups and name not in ups.values()]
        unknown += [
            name for name, target in targets.items() if target not in self._own or ups[name] not in tensors
        ]
        if unknown:
            raise ValueError(
                f"need additions lora_A and lora_B to matrices of the model, got {_some(unknown)}"
            )
        for name, target in targets.items():
            shape = (tensors[ups[name]].shape[0], tensors[name].shape[1])
            if tuple(self._own[target].shape) != shape:
                raise ValueError(
                    f"need additions of the shape of the matrix {target}, {tuple(self._own[target].shape)}, got {shape}"
                )
        for name, base in self._without_additions.items():
            self._own[name].copy_(base)
        for name, target in targets.items():
            weight = self._own[target]
            self._without_additions.setdefault(target, weight.detach().clone())
            down, up = (tensors[side].to(weight.device, torch.float32) for side in (name, ups[name]))
            weight.add_((up @ down) * scaling)
        return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


def _from_folder(
    folder: Path, wanted: Sequence[TensorInfo], own: Mapping[str, Tensor]
) -> Iterator[tuple[TensorInfo, Tensor]]:
    """The tensors of a Hugging Face folder that are wanted, by the names of the model; none named: all."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"need *.safetensors in {folder}, got none")
    infos = {info.name: info for info in wanted}
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if not infos or name in infos}  # noqa: SIM118
    if not set(infos or found) <= found.keys() or not found.keys() <= own.keys():
        # Some families name their tensors otherwise in files than in the model; Transformers knows how.
        found = {
            name: t
            for name, t in load_language_model(str(folder)).state_dict().items()
            if not infos or name in infos
        }
    if missing := sorted(infos.keys() - found.keys()):
        raise RuntimeError(
            f"need the tensors of the update in {folder}, but {len(missing)} are not there: {_some(missing)}"
        )
    for name, tensor in found.items():
        came = TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        yield infos.get(name, came), tensor.to(dtype_of(infos[name])) if name in infos else tensor


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
