"""Files that a written model takes over from the model that the run started from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import PreTrainedModel

from verl.engines.hf.pretrained import GENERATION_CONFIG
from verl.trainer.export.public_values import is_folder
from verl.utils.hub import generation_config_source
from verl.utils.tokens import TextCodec


@dataclass(frozen=True)
class BaseFiles:
    """The base model of a run, as far as the written model repeats it.

    Attributes:
        name: folder or hub name; empty for a loaded model without one.
        generation_config: content of its generation_config.json, whose end tokens may stand nowhere else;
            None: it has none.
    """

    name: str
    generation_config: str | None = None

    @classmethod
    def of(cls, source: PreTrainedModel | str, path: str | None) -> BaseFiles:
        """The files of a folder, a hub name, or a loaded model.

        Args:
            source: of the weights.
            path: folder or hub name of the other files; None: as `source` says.
        """
        name = path or (source if isinstance(source, str) else str(source.config.name_or_path))
        if isinstance(source, str) or not source.can_generate():
            return cls(name, _read(generation_config_source(name), GENERATION_CONFIG) if name else None)
        return cls(name, source.generation_config.to_json_string())

    def write(self, folder: Path, codec: TextCodec) -> None:
        """Write tokenizer, chat template and generation config beside the weights in a folder.

        The generation config is the base's, and where it lacks the token with which the chat template closes
        an answer, this token is added: a reader ends answers as the run did.
        """
        codec.tokenizer.save_pretrained(folder)
        path, text = folder / GENERATION_CONFIG, self.generation_config
        if text is None and not self.name and path.exists():
            text = path.read_text()  # a loaded model that came from nowhere: written with the weights
        config = json.loads(text or "{}")
        ends = config.get("eos_token_id", codec.tokenizer.eos_token_id)
        known = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if missing := [token for token in codec.closing_ids if token not in known]:
            text = json.dumps({**config, "eos_token_id": [*known, *missing]}, indent=2) + "\n"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)

    @property
    def card(self) -> dict[str, Any]:
        """Metadata of its model card, such as `license`; empty without one."""
        text = _read(self.name, "README.md")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text else {}

    @property
    def hub_name(self) -> str | None:
        """Name on the hub, of the model itself or of the one that its card names as its base."""
        if is_hub_name(self.name):
            return self.name
        named = self.card.get("base_model")
        return named if isinstance(named, str) and is_hub_name(named) else None


def is_hub_name(name: str) -> bool:
    """True if a name is no folder and may be one of the hub."""
    return name.count("/") == 1 and name[0] not in "/.~" and not is_folder(name)


def _read(name: str, file: str) -> str | None:
    """Content of a file of a model that was loaded from a folder, or from the hub's cache."""
    if not name:
        return None
    if Path(name).is_dir():
        path: Any = Path(name) / file
        return path.read_text() if path.exists() else None
    path = try_to_load_from_cache(name, file) if is_hub_name(name) else None
    return Path(path).read_text() if isinstance(path, str) else None
