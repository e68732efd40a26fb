"""Repositories of the Hugging Face hub and folders of models: looked up, and PEFT adapters recognized.

Without a network there is no long wait.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from transformers.utils.peft_utils import find_adapter_config_file

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CONFIGS = ("config.json", ADAPTER_CONFIG)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# Transformers itself would try again for half a minute.
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class HubAnswer:
    """Answer of the hub to the question for a repository.

    Attributes:
        commit: of the revision that was asked for; None: it cannot be read, for `reason`.
        reason: in words.
        is_gated: its files are only for those who accepted its terms.
        is_known: the hub answered; else there is no connection, or it is not asked.
        is_offline: HF_HUB_OFFLINE is set, so the hub was not asked.
    """

    commit: str | None
    reason: str = ""
    is_gated: bool = False
    is_known: bool = True
    is_offline: bool = False


def ask_hub(
    name: str, *, kind: Literal["model", "dataset"] = "model", revision: str | None = None
) -> HubAnswer:
    """Ask the hub for a repository, with one request and without a long wait.

    Args:
        name: OWNER/NAME.
        kind: of repository.
        revision: a branch, a tag or a commit; none: main.

    Raises:
        HFValidationError: the name cannot be one of the hub.
    """
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S)
    except HFValidationError:
        raise
    except OfflineModeIsEnabled:
        return HubAnswer(None, "HF_HUB_OFFLINE is set", is_known=False, is_offline=True)
    except RevisionNotFoundError:
        return HubAnswer(None, f"{constants.ENDPOINT} has no revision {revision!r} of it")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            # The hub answers the same for a private one without a token.
            return HubAnswer(None, f"{constants.ENDPOINT} has none that you may read (status {status})")
        return HubAnswer(None, f"{constants.ENDPOINT} answers with status {status}", is_known=False)
    except Exception as error:  # the classes differ between the HTTP libraries that the hub's client uses
        reason = str(error) or type(error).__name__
        return HubAnswer(None, f"the hub {constants.ENDPOINT} cannot be reached: {reason}", is_known=False)
    return HubAnswer(getattr(info, "sha", None), is_gated=bool(getattr(info, "gated", False)))


def cached_commit(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str | None:
    """Commit of a revision in the hub's cache, without asking the hub; None: it is not there."""
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    named = folder / "refs" / (revision or "main")
    if named.is_file():
        return named.read_text(encoding="utf-8").strip()
    return revision if revision and (folder / "snapshots" / revision).is_dir() else None


def why_missing(source: str) -> str | None:
    """Reason why a model cannot be loaded from a folder or hub name; None if it is there.

    Args:
        source: folder or name on the hub; a model in the hub's cache needs no network.
    """
    if Path(source).is_dir():
        return None
    # Hub names have at most one slash; another path that does not exist was meant as a folder.
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return "there is no such folder"
    here = f"there is no such folder in {Path.cwd()}"
    try:
        if any(isinstance(try_to_load_from_cache(source, name), str) for name in _CONFIGS):
            return None
        answer = ask_hub(source)
    except HFValidationError:
        return here
    if answer.is_offline:
        return f"{here}, nor such a model in the hub's cache, and {answer.reason}"
    return f"{here}, and {answer.reason}" if answer.reason else None


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes it.

    Attributes:
        source: folder or hub name, as it was given.
        folder: on this disk.
        settings: content of adapter_config.json.
    """

    source: str
    folder: Path
    settings: dict[str, Any]

    @property
    def base(self) -> str:
        """Folder or hub name of the model that the adapter belongs to.

        A relative folder is looked for in the working directory, then in the folder of the adapter.

        Raises:
            ValueError: the adapter names none, or no such folder exists.
        """
        named = self.settings.get("base_model_name_or_path")
        remedy = f"give the model as policy.path and {self.source} as policy.lora.path"
        if not named:
            raise ValueError(
                f"need base_model_name_or_path in {self.folder / ADAPTER_CONFIG}, the model that the adapter "
                f"belongs to, got none; {remedy}"
            )
        for place in (Path(named), self.folder / named):
            if place.is_dir() and place.resolve() != self.folder.resolve():
                return str(place)
        # Hub names have at most one slash, and do not begin as a path does.
        if named.startswith(("/", ".", "~")) or named.count("/") > 1:
            raise ValueError(
                f"need the base model of the adapter in {self.folder}, but base_model_name_or_path {named!r} "
                f"in its {ADAPTER_CONFIG} is no folder here; {remedy}"
            )
        return str(named)


def find_adapter(source: str) -> AdapterFolder | None:
    """The adapter at a folder or hub name; None: there is something else.

    Raises:
        ValueError: the folder has a whole model, too, or its adapter_config.json cannot be read.
    """
    found = str(Path(source) / ADAPTER_CONFIG) if Path(source).is_dir() else _on_hub(source)
    if found is None or not Path(found).exists():
        return None
    path = Path(found)
    wholes = [*path.parent.glob("model*.safetensors"), *path.parent.glob("pytorch_model*.bin")]
    if wholes:
        raise ValueError(
            f"need a model or a PEFT adapter in {source}, got both, {wholes[0].name} and {ADAPTER_CONFIG}; "
            "move one of them to a folder of its own"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"need JSON in {path}, got {error}; write the adapter anew") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"need a JSON object in {path}, got {type(settings).__name__}; write the adapter anew"
        )
    return AdapterFolder(source, path.parent, settings)


@cache
def _on_hub(source: str) -> str | None:
    """adapter_config.json of a hub name, downloaded; None: there is none."""
    found: str | None = None if why_missing(source) else find_adapter_config_file(source)
    if found:
        snapshot_download(source, allow_patterns=["adapter_*", "tokenizer*", "generation_config.json"])
    return found


def has_tokenizer(folder: Path) -> bool:
    """True if a folder has the files of a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def tokenizer_source(source: str) -> str:
    """Folder or hub name of the tokenizer of a model: of an adapter without one, its base model's."""
    return _with_files(source, _TOKENIZER_FILES)


def generation_config_source(source: str) -> str:
    """Folder or hub name of generation_config.json: of an adapter without one, its base model's."""
    return _with_files(source, ("generation_config.json",))


def _with_files(source: str, names: tuple[str, ...]) -> str:
    adapter = find_adapter(source)
    if adapter is None or any((adapter.folder / name).exists() for name in names):
        return source
    return adapter.base
