"""Upload of an export to the Hugging Face hub: only when the command line asks for it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mim.config import ConfigError
from mim.contracts import StorageError


def check(repository: str) -> None:
    """Refuse an upload that cannot work, before anything is exported: a wrong name, no token, offline mode."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repository!r} is no name of a repository; write e.g. me/my-vit") from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("--push-to-hub needs the network, but HF_HUB_OFFLINE is set; unset it to upload")
    if huggingface_hub.get_token() is None:
        raise ConfigError("--push-to-hub needs a token of the Hugging Face hub; run `hf auth login` or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload a folder as one commit, and return its address; a repository that is made for it is private."""
    api = huggingface_hub.HfApi(library_name="mimstream")
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export of mimstream")
    except (HfHubHTTPError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise StorageError(f"{folder} is exported, but was not uploaded to {repository}: {text}") from error
    return str(address)
