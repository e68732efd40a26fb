"""Models of Hugging Face folders: loaded into the memory of one process, saved, and tiny ones made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from verl.engines.hf.models import Backbone, Precision, ValueModel
from verl.utils.tokens import CHARACTERS, character_tokenizer

VALUE_HEAD = "value_head.safetensors"


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A model of one shard needs no bar; Transformers draws one for each load and save."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_language_model(path: str) -> PreTrainedModel:
    """A causal language model in fp32 from a folder or hub name, without code from the folder.

    Raises:
        ValueError: there is no such model.
    """
    try:
        with _without_progress_bars():
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a causal language model from {path!r}: {_cause(path, error)}"
        ) from error


def check_model(path: str) -> None:
    """Looks at the configuration of a model, before anything is loaded.

    Raises:
        ValueError: there is no such model.
    """
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a causal language model from {path!r}: {_cause(path, error)}"
        ) from error


def _cause(path: str, error: Exception) -> str:
    """Why nothing was loaded, in one line."""
    # Hub names have at most one slash; whatever else is not there was meant as a folder.
    if not Path(path).exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        return "there is no such folder"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_reward_model(path: str, *, new_head: bool) -> PreTrainedModel:
    """A reward model in fp32 from a folder or hub name, without code from the folder.

    Args:
        path: of a model for sequence classification with one label and a head named `score`, or of a causal
            language model.
        new_head: give a model without the weights of a head one of zeros, to be trained; else refuse it.

    Raises:
        ValueError: there is no such model, or it cannot score.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # It would report a missing head, which is dealt with here.
    try:
        with _without_progress_bars():
            options = {
                "dtype": torch.float32,
                "num_labels": 1,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,
            }
            model, loading = AutoModelForSequenceClassification.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a reward model from {path!r}: {_cause(path, error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing, others = set(loading["missing_keys"]), [key for key, *_ in loading["mismatched_keys"]]
    if (
        missing - {"score.weight"}
        or others
        or not isinstance(dict(model.named_modules()).get("score"), nn.Linear)
    ):
        unfit = [*sorted(missing), *others]
        raise ValueError(
            f"need a model that scores by a linear head named score with one label, got {type(model).__name__} in {path!r}"
            + (f", whose weights do not fit in {', '.join(unfit[:3])}" if unfit else "")
        )
    if missing and not new_head:
        raise ValueError(
            f"need a trained reward model, but the weights in {path!r} have no head (score.weight), so its scores would be random; "
            f"train one with `verl reward-model policy.path={path}` and give the folder `model` of that run"
        )
    if missing:
        nn.init.zeros_(model.score.weight)
    return model


def as_reward_model(source: PreTrainedModel) -> PreTrainedModel:
    """A model for sequence classification as it is; one with a head of zeros on the transformer of a causal
    language model.

    Raises:
        ValueError: its family has no such model.
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


def value_model(source: PreTrainedModel, precision: Precision) -> ValueModel:
    """A value model on the transformer of a causal language model (or on a bare transformer)."""
    transformer = source.base_model
    assert isinstance(transformer, PreTrainedModel)
    return ValueModel(transformer, precision)


def save_model(model: Backbone, folder: Path) -> None:
    """Writes the weights as safetensors in Hugging Face layout; the head of a value model into a file beside
    them.
    """
    with _without_progress_bars():
        model.transformer.save_pretrained(folder)
    if isinstance(model, ValueModel):
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in model.head.state_dict().items()},
            folder / VALUE_HEAD,
        )


def make_tiny_model(
    folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0, characters: str = CHARACTERS
) -> None:
    """Writes a random Qwen2-style model with the character tokenizer: 64 x 2 has 0.1M parameters, 128 x 4 has
    0.8M.

    Args:
        folder: where to.
        hidden: width.
        layers: depth.
        seed: of the weights.
        characters: of the vocabulary; the fewer, the easier it is to find a reward by chance.

    Raises:
        ValueError: `hidden` is not a multiple of 32.
    """
    if hidden % 32 or hidden < 32 or layers < 1:
        raise ValueError(
            f"need hidden as a multiple of 32 and at least one layer, got hidden={hidden} and layers={layers}"
        )
    tokenizer = character_tokenizer(characters)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 4) * 4,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # The usual 0.02 is made for widths of thousands; narrow models start to learn 3 times as fast with
        # this.
        initializer_range=0.8 * hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), _without_progress_bars():
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
