"""The weights that a policy starts from: a model, or a LoRA adapter that is merged or trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from verl.config.roles import RoleConfig
from verl.config.run import RunConfig
from verl.engines.hf.adapters import adapter_at, is_same_model
from verl.engines.hf.lora import import_peft
from verl.engines.hf.peft_config import continued_options
from verl.engines.hf.pretrained import check_model, check_quantization
from verl.trainer.export.base_files import BaseFiles
from verl.utils.hub import AdapterFolder, find_adapter, has_tokenizer


@dataclass(frozen=True)
class PolicyStart:
    """The start of a policy.

    Attributes:
        source: a loaded model, or the folder or hub name of a model or of an adapter to merge.
        tokenizer: folder or hub name with the tokenizer.
        files: what a written model takes over.
        adapter_base: folder or hub name of the model below the adapter that is trained; None: there is no
            adapter, or no such folder.
    """

    source: PreTrainedModel | str
    tokenizer: str
    files: BaseFiles
    adapter_base: str | None


def policy_start(
    config: RunConfig,
    given: PreTrainedModel | str | None,
    kind: str = "causal language model",
    *,
    note: Callable[[str], None],
) -> PolicyStart:
    """The start of a policy: `given`, else `policy.path`, else the base of the adapter in `policy.lora.path`.

    Args:
        config: of the run.
        given: if the caller has a model.
        kind: of the model, for messages.
        note: takes lines for the user on what becomes of adapters.

    Raises:
        ValueError: all are None, there is no model, or the adapter cannot be used.
    """
    policy = config.policy
    continued = None if policy.lora.path is None else _checked_adapter(policy)
    source = given if given is not None else policy.path
    if source is None and continued is not None:
        source = continued.base
    if source is None:
        raise ValueError(
            f"need policy.path: the folder or hub name of a {kind} (verl make-model makes a small one)"
        )
    merged = None
    if isinstance(source, str):
        check_model(source, kind)
        merged = find_adapter(source)
    check_quantization(policy.lora, is_adapter=merged is not None)
    if merged and continued and merged.folder.resolve() == continued.folder.resolve():
        raise ValueError(
            f"need the base model of the adapter {policy.lora.path} as policy.path, got the adapter itself, "
            "which would be added twice; leave policy.path out"
        )
    for line in _notes(policy, source, merged, continued):
        note(line)
    name = source if isinstance(source, str) else str(source.config.name_or_path)
    return PolicyStart(
        source,
        str(continued.folder) if continued and has_tokenizer(continued.folder) else policy.path or name,
        BaseFiles.of(source, policy.path),
        source if policy.lora.is_on and isinstance(source, str) and merged is None else None,
    )


def _checked_adapter(policy: RoleConfig) -> AdapterFolder:
    assert policy.lora.path is not None
    adapter = adapter_at(policy.lora.path)
    continued_options(adapter, policy.lora, import_peft())
    return adapter


def _notes(
    policy: RoleConfig,
    source: PreTrainedModel | str,
    merged: AdapterFolder | None,
    continued: AdapterFolder | None,
) -> Iterator[str]:
    """Lines for the user on what becomes of adapters."""
    if merged:
        trained = "a new adapter is trained on both" if policy.lora.is_on else "all weights are trained"
        yield (
            f"{source} is a LoRA adapter: it is merged into its base {merged.base}, and {trained}; to train "
            "the adapter itself, give it as policy.lora.path"
        )
    if policy.lora.is_on and (merged or not isinstance(source, str)):
        what = f"{source} merged into its base" if merged else "a model given in memory"
        yield (
            f"no folder `adapter` is written beside `model`: the weights below it, {what}, are in no folder "
            "that PEFT could load"
        )
    named = continued.settings.get("base_model_name_or_path") if continued else None
    if continued and isinstance(source, str) and not _is_base(continued, source):
        yield f"the adapter {continued.source} was trained on {named}; it is put on {source}"


def _is_base(adapter: AdapterFolder, source: str) -> bool:
    named = adapter.settings.get("base_model_name_or_path") or ""
    places = (named, str(adapter.folder / named))
    return any(is_same_model(place, source) for place in places) or Path(named).name == Path(source).name
