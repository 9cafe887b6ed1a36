"""The model that ships with Tokenloom: small emoji at 64 px, loaded where no model is named."""

from __future__ import annotations

from pathlib import Path

from tokenloom_common.errors import MissingFileError

SHIPPED_MODELS = Path(__file__).parent / "shipped_models"
DEFAULT_NAME = "emoji"


def default_model_folder() -> Path:
    """Return the folder of the shipped model. MissingFileError in an installation without it."""
    folder = SHIPPED_MODELS / DEFAULT_NAME
    if not (folder / "model_index.json").is_file():
        raise MissingFileError(
            f"{folder}: the model that ships with Tokenloom is not there; install Tokenloom again, "
            "or name a model folder")
    return folder
