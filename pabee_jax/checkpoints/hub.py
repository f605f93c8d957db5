"""Uploads a checkpoint to the Hugging Face hub."""

import tempfile

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.errors import InputError, first_line_of


def push_to_hub(
    pretrained: Pretrained, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload a checkpoint with its model card, as one commit; create the repository if needed.

    Args:
        pretrained: the contents of the checkpoint.
        repo_id: the repository, "name" or "owner/name".
        private: whether a new repository is private.
        token: an access token of the hub; absent, that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        InputError: the name is no repository's, the hub refuses the upload, or the hub cannot be
            reached.
    """
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(pretrained, folder)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                commit_message="Upload a classifier with early exits",
            )
        except HFValidationError as error:
            raise InputError(f"{repo_id!r} is no repository of the hub: {error}") from None
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise InputError(f"the hub refuses {repo_id}: {first_line_of(error)}") from None
        except Exception as error:  # Without a network, the exception depends on the transport.
            raise InputError(
                f"the hub cannot be reached for {repo_id}: {first_line_of(error)}"
            ) from None
    return str(address)
