"""LoRA adapters in PEFT's folders: read into a model, merged into its weights, and written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.config.roles import LoraConfig, RoleConfig
from verl.engines.hf.lora import POLICY, adapter_of, add_lora, base_name, import_peft, reset_lora
from verl.engines.hf.models import Backbone, RewardModel
from verl.engines.hf.peft_config import adapter_options
from verl.engines.hf.weights import to_full
from verl.utils.files import write_safetensors
from verl.utils.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, find_adapter

_PREFIX = "base_model.model."
_SCORE = "score.weight"


def add_adapter(
    transformer: PreTrainedModel, config: LoraConfig, *, name: str = POLICY, trained: bool = True
) -> None:
    """Add a LoRA adapter to a model on one device: a new one, or the one at `config.path`; see `add_lora`.

    Raises:
        ValueError: as `add_lora` and `load_adapter`.
    """
    add_lora(transformer, config, name=name, trained=trained)
    if config.path is None:
        reset_lora(transformer, name)
    else:
        load_adapter(transformer, adapter_at(config.path), name=name)


def adapter_at(source: str) -> AdapterFolder:
    """The adapter at a folder or hub name.

    Raises:
        ValueError: there is none.
    """
    adapter = find_adapter(source)
    if adapter is None:
        raise ValueError(f"need a folder or hub name with {ADAPTER_CONFIG}, got {source!r}; correct the path")
    return adapter


def read_adapter(adapter: AdapterFolder) -> dict[str, Tensor]:
    """Tensors of an adapter by their names in a model, without the prefix that PEFT adds.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = adapter.folder / ADAPTER_WEIGHTS
    if not path.exists():
        raise ValueError(
            f"need {ADAPTER_WEIGHTS} in {adapter.folder}, found none; save the adapter as safetensors"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"need whole safetensors in {path}, got {error}; copy the file again") from error
    # Where the vocabulary has grown, PEFT writes layers that are trained whole three times.
    repeated = (".original_module.", ".modules_to_save.")
    kept = {name: t for name, t in tensors.items() if not any(part in name for part in repeated)}
    # Beside an adapter of an embedding, PEFT writes the embedding of the base as base_layer.
    return {base_name(name.removeprefix(_PREFIX)): tensor for name, tensor in kept.items()}


def saved_name(name: str) -> str:
    """Name that a parameter of an adapter has in PEFT's files, without the prefix."""
    if ".modules_to_save." in name or not adapter_of(name):
        return base_name(name)
    plain = name.replace(f".{adapter_of(name)}", "", 1)
    # PEFT writes the magnitudes of DoRA as a parameter of the layer.
    return plain.removesuffix(".weight") if ".lora_magnitude_vector" in name else plain


def find_saved(name: str, tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    """Name in an adapter's tensors of a parameter of an adapter in a model.

    Args:
        name: of the parameter.
        tensors: of the adapter, see `read_adapter`.
        prefix: that a model with a head has before the names of its transformer.
    """
    saved = saved_name(name)
    candidates = (saved, f"{prefix}.{saved}", saved.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in tensors), None)


@torch.no_grad()
def load_adapter(transformer: PreTrainedModel, adapter: AdapterFolder, *, name: str = POLICY) -> None:
    """Read the values of an adapter into that of the name, which `add_lora` has added in its shape.

    Raises:
        ValueError: tensors are missing, left over, or have other shapes.
    """
    tensors = read_adapter(adapter)
    parameters = dict(transformer.named_parameters(remove_duplicate=False))  # an embedding may be tied
    own = {key: p for key, p in parameters.items() if adapter_of(key) == name}
    trained = {saved_name(key) for key in own}
    base = {base_name(key): p for key, p in parameters.items() if not adapter_of(key)}
    # PEFT may repeat an embedding of the model beside the adapter.
    for key in [key for key in tensors if key in base and key not in trained]:
        if tensors[key].shape == base[key].shape and torch.equal(tensors[key], base[key]):
            del tensors[key]
    _fill(own, tensors, adapter, transformer.base_model_prefix)


def _fill(
    parameters: Mapping[str, Tensor], tensors: dict[str, Tensor], adapter: AdapterFolder, prefix: str
) -> None:
    """Copy each tensor of an adapter to its parameter; each must have one."""
    names = {key: find_saved(key, tensors, prefix) for key in parameters}
    missing = [key for key, found in names.items() if found is None]
    unfit = [
        f"{found} {tuple(tensors[found].shape)}"
        for key, found in names.items()
        if found is not None and tensors[found].shape != parameters[key].shape
    ]
    check_complete(adapter, missing, sorted(tensors.keys() - {*names.values()}), unfit)
    for key, found in names.items():
        assert found is not None
        parameters[key].copy_(tensors[found])


def check_complete(
    adapter: AdapterFolder, missing: list[str], left_over: list[str], unfit: list[str]
) -> None:
    """Refuse an adapter whose tensors are not those that the model has places for.

    Raises:
        ValueError: names the first ones.
    """
    problems = {"no tensor for": missing, "no place for": left_over, "another shape of": unfit}
    found = [f"{text} {', '.join(names[:3])}" for text, names in problems.items() if names]
    if found:
        raise ValueError(
            f"need an adapter that fits the model, but {adapter.folder / ADAPTER_WEIGHTS} has "
            f"{'; '.join(found)}; it belongs to {adapter.settings.get('base_model_name_or_path')!r}"
        )


@torch.no_grad()
def merge_adapter(transformer: PreTrainedModel, adapter: AdapterFolder) -> PreTrainedModel:
    """The model with an adapter merged into its weights, in place.

    Raises:
        ValueError: the adapter does not fit, or has a feature that is not supported.
    """
    peft = import_peft()
    options, tensors = adapter_options(adapter, peft), read_adapter(adapter)
    _resize_vocabulary(transformer, tensors)
    _untie(transformer, tensors)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", module="peft")
        tuner = peft.LoraModel(transformer, options, POLICY)
        # Embeddings of a grown vocabulary are stored beside the adapter.
        wholes = {
            n: p for n, p in transformer.named_parameters() if not adapter_of(n) and base_name(n) in tensors
        }
        own = {n: p for n, p in transformer.named_parameters() if adapter_of(n)}
        saved = {n for n in own if ".modules_to_save." in n}
        wholes = {n: p for n, p in wholes.items() if base_name(n) not in {saved_name(s) for s in saved}}
        _fill({**own, **wholes}, tensors, adapter, transformer.base_model_prefix)
        merged: PreTrainedModel = tuner.merge_and_unload()
    return merged.requires_grad_(True).eval()


def _resize_vocabulary(transformer: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give the embeddings as many rows as the adapter has, whose training has added tokens."""
    embedding = transformer.get_input_embeddings()
    name = next(name for name, module in transformer.named_modules() if module is embedding)
    saved = tensors.get(f"{name}.weight")
    if saved is not None and saved.shape[0] != embedding.get_parameter("weight").shape[0]:
        resize: Callable[..., nn.Module] = transformer.resize_token_embeddings
        resize(saved.shape[0], mean_resizing=False)


def _untie(transformer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Separate tied embeddings, if an adapter changes one of them."""
    embedding, head = transformer.get_input_embeddings(), transformer.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = [name for name, module in transformer.named_modules() if module is head or module is embedding]
    if any(key.startswith(f"{name}.") for key in tensors for name in names):
        head.weight = nn.Parameter(head.weight.detach().clone())
        config = transformer.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def export_adapter(model: Backbone, folder: Path, *, base: str) -> None:
    """Write the adapter of a model in PEFT's layout; on all ranks together if the model is sharded.

    PEFT's `PeftModel.from_pretrained` puts it on the base again.

    Args:
        model: with an adapter.
        folder: destination, which gets adapter_config.json and adapter_model.safetensors.
        base: folder or hub name of the model that the adapter was put on.
    """
    transformer, name = model.transformer, model.adapter
    assert name, "only a model with an adapter has one to write"
    own = [(key, p) for key, p in transformer.named_parameters() if adapter_of(key) == name]
    tensors = {saved_name(key): to_full(parameter).cpu() for key, parameter in own}
    options: Any = copy.copy(transformer.peft_config[name])
    if isinstance(model, RewardModel):
        options.task_type = "SEQ_CLS"
        options.modules_to_save = sorted({*(options.modules_to_save or ()), "score"})
        tensors.setdefault(_SCORE, to_full(transformer.get_parameter(_SCORE)).cpu())
    else:
        options.task_type = "CAUSAL_LM"
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    options.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    options.inference_mode, options.init_lora_weights = True, True
    folder.mkdir(parents=True, exist_ok=True)
    options.save_pretrained(folder)
    named = {_PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()}
    write_safetensors(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def is_same_model(one: str, other: str) -> bool:
    """True if two folders or hub names are one model."""
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).resolve() == Path(other).resolve()
    return one == other


def reference_on_base(policy: RoleConfig, reference: str | None) -> tuple[bool, str | None]:
    """True if the reference is the frozen model below the policy's adapter, and the adapter that it needs.

    Args:
        policy: section of the policy.
        reference: folder or hub name; None: the policy at the start.
    """
    lora = policy.lora
    if not lora.is_on:
        return False, None
    if reference is None:
        return True, lora.path
    adapter = find_adapter(reference)
    base = policy.path or (adapter_at(lora.path).base if lora.path else None)
    if adapter is None or base is None or find_adapter(base) or not is_same_model(adapter.base, base):
        return False, None
    return True, reference
