"""Construction of a Megatron-Core engine from the settings of a role."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.engines.hf.hf_io import model_folder
from verl.engines.megatron.engine import MegatronEngine, MegatronForwardEngine
from verl.engines.megatron.hf_io import fill_from_folder
from verl.engines.megatron.model import MegatronPolicy, MegatronValue, make_stages, transformer_config
from verl.engines.megatron.model_spec import MegatronModelSpec
from verl.engines.megatron.parallel_dims import ParallelSizes, make_coordinates

# Options of this engine, with their defaults.
OWN_OPTIONS: dict[str, Any] = {
    "virtual_pipeline": 1,
    "expert": 1,
    "make_vocab_size_divisible_by": 128,
    "bucket_size": None,
    "overlap_grad_reduce": False,
}
# Fields of Megatron-Core's TransformerConfig that are passed through.
PASSED_OPTIONS = (
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "moe_router_dtype",
)


def megatron_engine(
    source: str,
    kind: Literal["policy", "value", "reward"],
    role: RoleConfig,
    parallel: ParallelConfig,
    *,
    device: torch.device,
    total_updates: int | None,
) -> MegatronForwardEngine:
    """The engine of a model that is divided over all ranks of the default process group; a collective call.

    Each rank reads only its own slices from the folder.

    Args:
        source: folder or hub name of a causal language model.
        kind: of the model to be made of it.
        role: precision, optimizer.
        parallel: parallel sizes (`sequence` is Megatron-Core's context parallelism), and engine options.
        device: of this rank.
        total_updates: of the whole run, for the learning rate schedule; None: the model is only read.

    Raises:
        ValueError: sizes or options that do not fit the model, the ranks or this engine, or no model.
    """
    if kind == "reward":
        raise ValueError(
            "need engine fsdp for a reward model: engine megatron trains policies and value models"
        )
    own, passed = _check_options(role, parallel)
    folder = model_folder(source)
    spec = _read_spec(folder, kind, multiple=own["make_vocab_size_divisible_by"] * parallel.tensor)
    if spec.is_moe and parallel.tensor > 1:
        # Megatron-Core's token dispatchers need each token on one tensor rank only.
        passed.setdefault("sequence_parallel", True)
    coordinates = make_coordinates(_check_sizes(spec, parallel, own, passed), device)
    precision: Any = role.precision
    with coordinates.active():
        config = transformer_config(spec, coordinates, precision, passed)
        stages, has_head = make_stages(config, spec, coordinates), coordinates.is_last_stage
        if kind == "value":
            model: MegatronPolicy | MegatronValue = MegatronValue(stages, precision, has_head=has_head)
        else:
            model = MegatronPolicy(stages, spec, precision, has_head=has_head)
        model.sequence, model.compute_device = coordinates.sequence, device
        if total_updates is None:
            model.requires_grad_(False)
        engine = MegatronForwardEngine(
            model, role, spec=spec, coordinates=coordinates, megatron_config=config
        )
        fill_from_folder(engine.all_local_shards(), engine.local_parameters(), folder, spec)
        if total_updates is None:
            return engine
        return MegatronEngine(
            engine,
            total_updates=total_updates,
            bucket_size=own["bucket_size"],
            overlap_grad_reduce=own["overlap_grad_reduce"],
        )


def _read_spec(folder: Path, kind: Literal["policy", "value"], *, multiple: int) -> MegatronModelSpec:
    """The model in a folder, its vocabulary padded to a multiple."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model from {str(folder)!r}: {error}") from error
    return MegatronModelSpec(config, kind, -(-config.vocab_size // multiple) * multiple)


def _check_sizes(
    spec: MegatronModelSpec, parallel: ParallelConfig, own: dict[str, Any], passed: dict[str, Any]
) -> ParallelSizes:
    """The parallel sizes of a model.

    Raises:
        ValueError: they do not divide the model.
    """
    sizes = ParallelSizes(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.sequence,
        expert=own["expert"] if spec.is_moe else 0,
        virtual_pipeline=own["virtual_pipeline"],
    )
    has_equal_stages = not any(name.startswith("num_layers_in_") for name in passed)
    spec.check_divisible(
        tensor=sizes.tensor,
        context=sizes.context,
        expert=own["expert"],
        num_chunks=sizes.pipeline * sizes.virtual_pipeline if has_equal_stages else 1,
    )
    return sizes


def _check_options(role: RoleConfig, parallel: ParallelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of this engine, and those that are passed through.

    Raises:
        ValueError: an unknown option, or a setting that this engine does not support.
    """
    given = parallel.engine.options
    known = (*OWN_OPTIONS, *PASSED_OPTIONS)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"engine megatron has no option {', '.join(unknown)}; it has {', '.join(known)}")
    if role.precision == "fp16":
        raise ValueError("need precision fp32 or bf16 for engine megatron, got fp16")
    if not role.packing:
        raise ValueError("need packing true for engine megatron: it reads rows as one packed sequence")
    unsupported = {
        "replicas": parallel.replicas > 1,
        "offload": parallel.offload,
        "lora.rank": role.lora.is_on,
        f"optimizer.name {role.optimizer.name}": role.optimizer.name.lower() != "adamw",
        "optimizer.options": bool(role.optimizer.options.values),
    }
    if found := [name for name, is_set in unsupported.items() if is_set]:
        raise ValueError(f"engine megatron has no {', '.join(found)}; leave them out, or use engine fsdp")
    own = {name: given.get(name, default) for name, default in OWN_OPTIONS.items()}
    for name in ("virtual_pipeline", "expert", "make_vocab_size_divisible_by"):
        if type(own[name]) is not int or own[name] < 1:
            raise ValueError(f"need an integer from 1 for {name} of engine megatron, got {own[name]!r}")
    if own["virtual_pipeline"] > 1 and parallel.pipeline == 1:
        raise ValueError(
            f"need pipeline above 1 for virtual_pipeline={own['virtual_pipeline']}, got 1; "
            "only pipeline stages can be interleaved"
        )
    passed = {name: value for name, value in given.items() if name in PASSED_OPTIONS}
    if passed.get("sequence_parallel") and parallel.tensor == 1:
        raise ValueError(
            "need tensor above 1 for sequence_parallel: it divides a sequence among tensor ranks"
        )
    if role.gradient_checkpointing and "recompute_granularity" not in passed:
        passed |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return own, passed
