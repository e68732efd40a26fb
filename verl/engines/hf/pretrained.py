"""Models of Hugging Face folders: loaded into the memory of one process, saved, and tiny ones made."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from verl.config.roles import LoraConfig
from verl.engines.hf.adapters import merge_adapter, read_adapter
from verl.engines.hf.lora import import_peft
from verl.engines.hf.models import Backbone, Precision, ValueModel
from verl.engines.hf.peft_config import adapter_options
from verl.utils.device import PRECISIONS
from verl.utils.files import apply_umask, write_safetensors
from verl.utils.hub import AdapterFolder, find_adapter, why_missing
from verl.utils.tokens import CHARACTERS, character_tokenizer

VALUE_HEAD, GENERATION_CONFIG = "value_head.safetensors", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Size of a weights file above which a model is written into several.
MAX_FILE_BYTES = 4 * 2**30


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Context without the progress bars that Transformers draws for each load and save, even of one file."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_language_model(path: str, **options: Any) -> PreTrainedModel:
    """A causal language model in fp32 from a folder or hub name, without code from the folder.

    A PEFT adapter is merged into its base model.

    Args:
        path: folder or hub name.
        options: of Transformers' `from_pretrained`.

    Raises:
        ValueError: there is no such model.
    """
    check_exists(path, "a causal language model")
    adapter = find_adapter(path)
    base = path if adapter is None else _checked_base(adapter)
    try:
        with without_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load a causal language model from {_described(path, base)}: {load_failure(error)}"
        ) from error
    return model if adapter is None else merge_adapter(model, adapter)


def check_model(path: str, kind: str = "causal language model") -> PretrainedConfig:
    """The configuration of a model, read to fail before its weights are loaded.

    Args:
        path: folder or hub name.
        kind: of the model, for the message.

    Raises:
        ValueError: there is no such model.
    """
    check_exists(path, f"a {kind}")
    adapter = find_adapter(path)
    base = path if adapter is None else _checked_base(adapter)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        described = _described(path, base)
        raise ValueError(f"cannot load a {kind} from {described}: {load_failure(error)}") from error
    return config


def model_config_of(source: str | PreTrainedModel) -> PretrainedConfig:
    """The configuration of a folder, hub name or loaded model.

    Raises:
        ValueError: as `check_model`.
    """
    return check_model(source) if isinstance(source, str) else source.config


def check_exists(path: str, kind: str) -> None:
    """Raise ValueError if there is no such folder and no such model on the hub; `kind` is for the message."""
    if reason := why_missing(path):
        raise ValueError(f"cannot load {kind} from {path!r}: {reason}")


def _checked_base(adapter: AdapterFolder) -> str:
    """The base model of an adapter that can be merged into it."""
    adapter_options(adapter, import_peft())
    base = adapter.base
    if reason := why_missing(base):
        raise ValueError(f"cannot load {_described(adapter.source, base)}: {reason}")
    if find_adapter(base):
        raise ValueError(
            f"need a whole model as base of the adapter in {adapter.source}, got another adapter, {base!r}; "
            "merge that one into its base first"
        )
    return base


def _described(path: str, base: str) -> str:
    return repr(path) if path == base else f"{base!r}, the base of the adapter in {path!r}"


def load_failure(error: Exception) -> str:
    """The reason why Transformers could not load a model, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_reward_model(path: str, *, new_head: bool) -> PreTrainedModel:
    """A reward model in fp32 from a folder or hub name, without code from the folder.

    Args:
        path: a model for sequence classification with one label and a head named `score`, a causal language
            model, or a PEFT adapter on one of them, which is merged.
        new_head: give a model without a head a new one of zeros, to be trained; else refuse the model.

    Raises:
        ValueError: there is no such model, or it has no such head.
    """
    check_exists(path, "a reward model")
    adapter = find_adapter(path)
    base = path if adapter is None else _checked_base(adapter)
    verbosity = transformers_logging.get_verbosity()
    # Transformers would warn about a missing head, which is handled below.
    transformers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                base,
                dtype=torch.float32,
                num_labels=1,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load a reward model from {_described(path, base)}: {load_failure(error)}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if adapter is not None:
        has_head = "score.weight" in read_adapter(adapter)
        model = merge_adapter(model, adapter)
        loading["missing_keys"] = [] if has_head else loading["missing_keys"]
    missing, mismatched = set(loading["missing_keys"]), [key for key, *_ in loading["mismatched_keys"]]
    has_linear_head = isinstance(dict(model.named_modules()).get("score"), nn.Linear)
    if missing - {"score.weight"} or mismatched or not has_linear_head:
        unfit = [*sorted(missing), *mismatched]
        raise ValueError(
            "need a model that scores by a linear head named score with one label, got "
            f"{type(model).__name__} in {path!r}"
            + (f", whose weights do not fit in {', '.join(unfit[:3])}" if unfit else "")
        )
    if missing and not new_head:
        raise ValueError(
            f"need a trained reward model, but the weights in {path!r} have no head (score.weight), so its "
            f"scores would be random; train one with `verl reward-model policy.path={path}` and give the "
            "folder `model` of that run"
        )
    if missing:
        nn.init.zeros_(model.score.weight)
    return model


def as_reward_model(source: PreTrainedModel) -> PreTrainedModel:
    """A reward model from a loaded model, in fp32.

    A model for sequence classification stays as it is; the transformer of a causal language model gets a head
    of zeros.

    Raises:
        ValueError: the family has no model for sequence classification.
    """
    if isinstance(dict(source.named_modules()).get("score"), nn.Linear):
        return source.float()
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config).float()
    except ValueError as error:
        raise ValueError(
            f"there is no reward model on the family {config.model_type!r}; take another one"
        ) from error
    model.base_model.load_state_dict(source.base_model.state_dict())
    nn.init.zeros_(model.score.weight)
    return model


def check_quantization(lora: LoraConfig, *, is_adapter: bool = False) -> None:
    """Refuse weights in 4 bits where they cannot be made, before anything is loaded.

    Args:
        lora: the settings.
        is_adapter: the model is an adapter to merge.

    Raises:
        ValueError: no GPU, no bitsandbytes, or a model that is merged first.
    """
    if lora.quantize == "none":
        return
    lacks = {
        "an NVIDIA GPU": not torch.cuda.is_available(),
        "bitsandbytes (pip install bitsandbytes)": importlib.util.find_spec("bitsandbytes") is None,
        "the folder of a whole model instead of an adapter": is_adapter,
    }
    if missing := [what for what, is_lacking in lacks.items() if is_lacking]:
        raise ValueError(
            f"need {', '.join(missing)} for lora.quantize={lora.quantize}; set it to none to train LoRA "
            "adapters on the whole weights"
        )


def quantization(lora: LoraConfig, precision: Precision, device: torch.device) -> dict[str, Any]:
    """Options of Transformers for weights in 4 bits; none for `quantize` none.

    QLoRA, https://arxiv.org/abs/2305.14314, section 3: NF4 with quantized constants.
    """
    check_quantization(lora)
    if lora.quantize == "none":
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=PRECISIONS[precision],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def load_value_head(model: ValueModel, source: str) -> None:
    """Read the head of a critic from its folder, if it has one there."""
    path = Path(source) / VALUE_HEAD
    if path.exists():
        model.head.load_state_dict(load_file(path))


def value_model(source: PreTrainedModel, precision: Precision) -> ValueModel:
    """A value model on the transformer of a causal language model (or on a bare transformer)."""
    transformer = source.base_model
    assert isinstance(transformer, PreTrainedModel)
    return ValueModel(transformer, precision)


def save_model(model: Backbone, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write the weights in Hugging Face format, and the head of a value model into a file beside them."""
    save_transformer(model.transformer, folder, max_file_bytes=max_file_bytes)
    if isinstance(model, ValueModel):
        head = {name: t.detach().cpu().contiguous() for name, t in model.head.state_dict().items()}
        write_safetensors(head, folder / VALUE_HEAD)


def save_transformer(
    transformer: PreTrainedModel, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a model of Transformers that is whole in the memory of this process, without a tokenizer."""
    generation = transformer.generation_config if transformer.can_generate() else None
    if generation is not None:
        # Transformers refuses to save some generation configs that it loads, such as one with a temperature
        # and without sampling; that must not cost the weights.
        transformer.generation_config = GenerationConfig()
    (folder / WEIGHTS_INDEX).unlink(missing_ok=True)
    try:
        with without_progress_bars():
            transformer.save_pretrained(folder, max_shard_size=max_file_bytes)
    finally:
        if generation is not None:
            transformer.generation_config = generation
    if generation is not None:
        (folder / GENERATION_CONFIG).write_text(generation.to_json_string())
    apply_umask(*remove_other_weights(folder))


def remove_other_weights(folder: Path) -> list[Path]:
    """Remove weights that an earlier model left in a folder; returns the files of the model in it."""
    index = folder / WEIGHTS_INDEX
    kept = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WEIGHTS}
    for path in folder.glob("model*.safetensors"):
        if path.name not in kept:
            path.unlink()
    (folder / VALUE_HEAD).unlink(missing_ok=True)
    return [folder / name for name in sorted(kept)]


def make_tiny_model(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    characters: str = CHARACTERS,
    words: Sequence[str] = (),
) -> None:
    """Write a random Qwen2-style model with a character tokenizer.

    With hidden=64 and layers=2 it has 0.1M parameters, with 128 and 4 it has 0.8M.

    Args:
        folder: the folder to write.
        hidden: width, a multiple of 32.
        layers: depth.
        seed: seed of the weights.
        characters: the vocabulary; with fewer characters a reward is found by chance more easily.
        words: texts that are one token each, which makes conversations shorter.

    Raises:
        ValueError: `hidden` is not a multiple of 32.
    """
    if hidden % 32 or hidden < 32 or layers < 1:
        raise ValueError(
            f"need hidden as a multiple of 32 and at least one layer, got hidden={hidden} and layers={layers}"
        )
    tokenizer = character_tokenizer(characters, words)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 4) * 4,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # The usual 0.02 is for widths of thousands; with this, narrow models start to learn 3 times as fast.
        initializer_range=0.8 * hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), without_progress_bars():
        torch.manual_seed(seed)
        save_transformer(Qwen2ForCausalLM(config), folder)
    tokenizer.save_pretrained(folder)
