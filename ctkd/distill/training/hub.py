"""The upload of a finished run to the hub, and what stands in its way, before the run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ctkd.distill.config import TrainConfig
from ctkd.distill.models.checks import one_line
from ctkd.distill.models.loading import sources
from ctkd.distill.training.card import write_card
from ctkd.distill.training.output_folder import OutputFolder
from ctkd.errors import OutputError, SettingError

__all__ = ["NOT_UPLOADED", "check_upload", "upload"]

# The name under which a run keeps where it was sent.
_RESULT = "pushed"
NOT_UPLOADED = (
    ".*",
    "bits-*",
    "checkpoint-*",
    "control/*",
    "ctkd.json",
    "predictions-*",
    "tensorboard/*",
    "training_args.bin",
)
"""What stays: checkpoints, the control, held-out texts, and files that name folders of yours."""


def check_upload(config: TrainConfig) -> None:
    """Find out before the first step whether the run can be sent to the hub after the last one.

    The hub is asked whose the token is, nothing is sent.

    Raises:
        SettingError: If the id is none, there is no token that may write, the hub does not answer,
            or nobody else could load what is to be sent.
    """
    if not config.push_to_hub:
        return
    try:
        validate_repo_id(_repository(config))
    except HFValidationError as error:
        raise SettingError(
            f"hub_model_id {_repository(config)!r} is no id of the hub; give one such as "
            f"my-name/my-model ({one_line(error)})"
        ) from error
    if not config.lora_merge and _leaves_adapters_of_a_folder(config):
        raise SettingError(
            f"adapters of {config.student}, which lies on this machine, can be loaded nowhere "
            "else; send the whole model (lora_merge), or name the student by its hub id"
        )
    token = get_token()
    if token is None:
        raise SettingError(
            "push_to_hub needs a token of the hub; set HF_TOKEN, or run `hf auth login`"
        )
    try:
        user = HfApi(token=token).whoami()
    except Exception as error:
        way_out = (
            "look at HF_TOKEN"
            if isinstance(error, HfHubHTTPError)
            else ("leave push_to_hub out, and upload the folder later (`hf upload`)")
        )
        raise SettingError(
            f"the hub does not say whose the token is: {one_line(error)}; {way_out}"
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise SettingError(
            "the token of the hub may only read; push_to_hub needs one that may write"
        )


def upload(config: TrainConfig, folder: OutputFolder, say: Callable[[str], None]) -> None:
    """Send a finished run to the hub, once, if that is asked for.

    Raises:
        OutputError: If it cannot be sent; the message has the command that sends it later.
    """
    if not config.push_to_hub or _RESULT in folder.results:
        return
    # It names the model as it is called there.
    write_card(folder, say)
    repository = _repository(config)
    say(f"sending {folder.path} to the hub as {repository}")
    api = HfApi(token=get_token())
    try:
        made = api.create_repo(repository, private=config.hub_private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder.path,
            ignore_patterns=list(NOT_UPLOADED),
            commit_message="A run of ctkd",
        )
    except Exception as error:
        private = ["--private"] if config.hub_private else []
        left_out = [word for one in NOT_UPLOADED for word in ("--exclude", one)]
        later = shlex.join(["hf", "upload", repository, str(folder.path), ".", *private, *left_out])
        raise OutputError(
            f"the run is finished and lies in {folder.path}, but could not be sent to the hub: "
            f"{one_line(error)}; repeat the command with --resume, or run: {later}"
        ) from error
    folder.keep(_RESULT, str(made))
    say(f"sent to {made}")


def _leaves_adapters_of_a_folder(config: TrainConfig) -> bool:
    if config.student_config is not None:
        return False
    *above, below = sources(config.student)
    return Path(below).is_dir() and (bool(above) or config.lora_rank is not None)


def _repository(config: TrainConfig) -> str:
    return config.hub_model_id or Path(config.folder).resolve().name
