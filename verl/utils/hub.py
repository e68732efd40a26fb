"""Names of models on the Hugging Face hub, looked up once, without a long wait where there is no network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

# Transformers itself would try again for half a minute.
_TIMEOUT_S = 5.0


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
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return None
        HfApi().model_info(source, timeout=_TIMEOUT_S)
    except HFValidationError:
        return here
    except OfflineModeIsEnabled:
        return f"{here}, nor such a model in the hub's cache, and HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            # The hub answers the same for a private model without a token.
            return f"{here}, and {constants.ENDPOINT} has none that you may read (status {status})"
        return f"{here}, and {constants.ENDPOINT} answers with status {status}"
    except Exception as error:  # the classes differ between the HTTP libraries that the hub's client uses
        reason = str(error) or type(error).__name__
        return f"{here}, and the hub {constants.ENDPOINT} cannot be reached: {reason}"
    return None
