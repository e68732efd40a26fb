"""Upload of a written model to the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

T = TypeVar("T")
# The library under huggingface_hub differs between its versions; its errors have this base.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# Files of a model folder; whatever else lies in it stays here.
_SENT = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "README.md", "training.png",
)  # fmt: skip


@dataclass(frozen=True)
class HubUpload:
    """A model folder on its way to the hub.

    Attributes:
        repo: name on the hub, USER/NAME.
        folder: with the model.
        is_private: if the repository is created, only its owner sees it; else everyone does.
    """

    repo: str
    folder: Path
    is_private: bool = False

    def check(self) -> None:
        """Check what can be checked without network, before a model is written.

        Raises:
            ValueError: the name is none of the hub, or there is no token.
        """
        self.check_name()
        if get_token() is None:
            raise ValueError(
                f"need a token with write access to push to {self.repo}, found none; run `hf auth login`, or "
                "set HF_TOKEN"
            )

    def check_name(self) -> None:
        """Raise ValueError if the repository's name is none of the hub."""
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ValueError(f"need USER/NAME for --push-to-hub, got {self.repo!r}: {error}") from error

    def files(self) -> dict[str, int]:
        """Files that are sent, with their bytes."""
        paths = [path for path in sorted(self.folder.iterdir()) if path.is_file()]
        names = set(filter_repo_objects([path.name for path in paths], allow_patterns=list(_SENT)))
        return {path.name: path.stat().st_size for path in paths if path.name in names}

    def send(self) -> str:
        """Create the repository if it is absent, and upload the files in one commit.

        Weights that the repository has and the folder lacks are removed from it.

        Returns:
            Address of the model.

        Raises:
            ValueError: the hub refuses the token, the name or a file.
            RuntimeError: the hub cannot be reached or fails.
        """
        # Read now: the library reads it once, when it is imported.
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        created = self._call(
            lambda: api.create_repo(self.repo, private=self.is_private or None, exist_ok=True), api
        )
        self._call(
            lambda: api.upload_folder(
                repo_id=created.repo_id,
                folder_path=self.folder,
                commit_message="Upload a model trained with verl",
                allow_patterns=list(self.files()),
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            ),
            api,
        )
        return str(created)

    def _call(self, request: Callable[[], T], api: HfApi) -> T:
        """Result of a request, with its errors as one message that has the remedy."""
        kept = f"the model is in {self.folder}; send it later with `hf upload {self.repo} {self.folder}`"
        try:
            return request()
        except HfHubHTTPError as error:
            status = error.response.status_code
            reason = (error.server_message or str(error)).strip().splitlines()[0]
            remedies = {
                401: "the token is not valid: run `hf auth login`, or set another HF_TOKEN",
                403: f"the token may not write there: take one with write access to {self.repo}",
                404: f"there is no such user or organization, or the token does not see {self.repo}",
            }
            remedy = remedies.get(status)
            kind = RuntimeError if remedy is None or status >= 500 else ValueError
            advice = f"{remedy}; {kept}" if remedy else kept
            raise kind(f"the hub refused {self.repo} with {status} ({reason}); {advice}") from error
        except OfflineModeIsEnabled as error:
            raise ValueError(
                f"need the network to push to {self.repo}, but HF_HUB_OFFLINE is set; unset it; {kept}"
            ) from error
        except (_TRANSPORT_ERROR, OSError) as error:
            raise RuntimeError(
                f"cannot reach the hub at {api.endpoint} ({type(error).__name__}: {error}); check network, "
                f"proxy and HF_ENDPOINT; {kept}"
            ) from error
