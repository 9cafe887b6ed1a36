"""Where a run's model comes from before the run has weights of its own.

That is the folder that `init_from` names or, where the run goes on from a checkpoint, that
checkpoint. Only configs are read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.model_folder import INDEX_NAME, read_model_index
from seq2seq import TRANSFORMER_KINDS, FrozenTextConfig, FrozenTextEncoder, TransformerConfig
from seq2seq.config import DERIVED
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.pretrained import MODEL_FILES, read_config, resolve_folder

MANIFEST = "MANIFEST.json"
"""In each checkpoint: sizes and hashes of its files, and the facts of its run."""
CONFIGS = ("*.json",)  # all that a config's check fetches from the hub: no gigabytes of weights
TOKENIZER_FILES = ("*.json", "model*.safetensors", "tokenizer_image/*")
TEXT_FOLDER, IMAGE_FOLDER = "text_tokenizer", "tokenizer_image"
"""The tokenizers in a model folder, and in a run's own."""


@dataclass(frozen=True)
class StartFolder:
    """The folder that init_from names: a whole model folder, or a transformer alone.

    name: as it was given; whole: whether tokenizers of text and image lie beside the transformer.
    """

    name: str
    folder: Path
    whole: bool

    @property
    def transformer(self) -> Path:
        """The folder of its config.json and weights."""
        return self.folder / "seq2seq" if self.whole else self.folder

    def config(self) -> TransformerConfig:
        """Read the transformer's config. UserError naming the file on any damage."""
        kind = TRANSFORMER_KINDS[str(read_mapping(self.transformer / "config.json").get("kind"))]
        config = read_config(self.transformer, kind.kind, kind.config_class)
        return config  # type: ignore[return-value]


def find_start(name: str, patterns: tuple[str, ...] = MODEL_FILES) -> StartFolder:
    """Find the transformer that init_from names. UserError where it is none.

    name: a local folder, or a hub id, of which the files that match `patterns` are fetched.
    """
    folder = _resolve(name, patterns)
    whole = (folder / INDEX_NAME).is_file()
    if whole:
        read_model_index(folder)  # raises on a damaged one

    start = StartFolder(name, folder, whole)
    path = start.transformer / "config.json"
    kind = read_mapping(path).get("kind") if path.is_file() else None
    if kind not in TRANSFORMER_KINDS:
        holds = f"holds kind {kind!r}" if path.is_file() else "is not there"
        raise UserError(f"init_from {name}: neither a model folder ({INDEX_NAME}) nor one of a "
                        f"transformer: {path} {holds}, expected {' or '.join(TRANSFORMER_KINDS)}; "
                        "give the folder that training wrote as RUN/model")
    return start


def find_tokenizer(name: str, patterns: tuple[str, ...] = TOKENIZER_FILES) -> Path:
    """Find the image tokenizer that init_from names: that folder, or the one in a model folder."""
    folder = _resolve(name, patterns)
    if not (folder / INDEX_NAME).is_file():
        return folder
    read_model_index(folder)
    return folder / IMAGE_FOLDER


def refuse_own_run(name: str, folder: Path, run_dir: str) -> None:
    """UserError when the folder that a fresh run begins from is its run_dir or lies inside it.

    A fresh start puts aside what a run folder holds, so the model would be taken apart.
    """
    if folder.resolve().is_relative_to(Path(run_dir).resolve()):
        raise UserError(f"init_from {name}: lies in run_dir {run_dir}, where a fresh run puts "
                        "aside what is there; give another --run_dir")


def _resolve(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        return resolve_folder(name, patterns=patterns)
    except MissingFileError as error:  # stays one, which is a FileNotFoundError too
        raise MissingFileError(f"init_from {error}") from None
    except UserError as error:
        raise UserError(f"init_from {error}") from None


def facts_of_run(run_dir: str | Path, resume: str) -> dict[str, Any] | None:
    """Read the facts of a run from its newest checkpoint; None where no run is continued."""
    if resume == "never":
        return None
    # newest first: names have the step with leading zeros
    for path in sorted(Path(run_dir).glob(f"checkpoints/step-*/{MANIFEST}"), reverse=True):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # RunState says what is wrong with it
        if isinstance(facts, dict) and isinstance(facts.get("model"), dict):
            return facts
    return None


def _facts_of_values(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """facts_of_run for a config that is still plain values, and may hold sections of any type."""
    run_dir = values.get("run_dir")
    if not isinstance(run_dir, str):
        return None
    checkpoint = values.get("checkpoint")
    if isinstance(checkpoint, dict):
        resume = checkpoint.get("resume", "auto")
    else:
        resume = getattr(checkpoint, "resume", "auto")
    return facts_of_run(run_dir, str(resume))


def tokenizer_of_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the config, as plain values, of the image tokenizer that init_from begins with."""
    facts = _facts_of_values(values)
    if facts:  # the run goes on: its own model decides
        model = facts["model"]
    else:
        model = read_mapping(find_tokenizer(str(values["init_from"]), CONFIGS) / "config.json")
    # schema_version is about the file and no field of the config
    return {name: value for name, value in model.items() if name != "schema_version"}


def with_start(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in model and text input of a transformer's recipe, where init_from decides them."""
    model = values.get("model") or {}
    text = values.get("text") or {}
    # a section that is no mapping is left as it is: validation says what is wrong with it
    lacks_model = isinstance(model, dict) and not {"kind", "preset"} & set(model)
    lacks_text = isinstance(text, dict) and not {"kind", "start_from"} & set(text)
    if not lacks_model and not lacks_text:
        return values

    text_folder: Path | None = None  # a transformer alone has none
    facts = _facts_of_values(values)
    if facts is not None:
        start_model = facts["model"]
        text_folder = Path(values["run_dir"]) / TEXT_FOLDER
    else:
        start = find_start(str(values["init_from"]), CONFIGS)
        if start.whole:
            text_folder = start.folder / TEXT_FOLDER
        if lacks_model:
            config = start.config()
            start_model = {"kind": config.kind, **config.plain()}

    if lacks_model:  # without the fields that this run's tokenizers and data decide
        chosen = {name: value for name, value in start_model.items() if name not in DERIVED}
        model = {**chosen, **model}  # single fields of the recipe count more
    if lacks_text and text_folder is not None:
        text = {**_text_input(text_folder), **text}
    return {**values, "model": model, "text": text}


def _text_input(folder: Path) -> dict[str, Any]:
    """Read text.kind from a text tokenizer's folder; of a frozen encoder also name and padding."""
    kind = read_mapping(folder / "config.json").get("kind")
    if kind != FrozenTextEncoder.kind:
        return {"kind": kind}
    encoder = read_config(folder, kind, FrozenTextConfig)
    return {"kind": kind, "encoder": encoder.name, "padding": encoder.padding}
