"""Where a run's model comes from before the run has weights of its own: the folder that `init_from` names, or, where the run
goes on from a checkpoint, that checkpoint. Only configs are read here."""

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
CONFIGS = ("*.json",)
TOKENIZER_FILES = ("*.json", "model*.safetensors", "tokenizer_image/*")
TEXT_FOLDER, IMAGE_FOLDER = "text_tokenizer", "tokenizer_image"
"""The tokenizers in a model folder, and in a run's own."""


@dataclass(frozen=True)
class StartFolder:
    """What init_from names: a whole model folder, or a transformer alone.

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
        """Of the transformer. UserError naming the file on any damage."""
        kind = TRANSFORMER_KINDS[str(read_mapping(self.transformer / "config.json").get("kind"))]
        return read_config(self.transformer, kind.kind, kind.config_class)  # type: ignore[return-value]


def find_start(name: str, patterns: tuple[str, ...] = MODEL_FILES) -> StartFolder:
    """The folder of a transformer that init_from names: local, or a hub id, of which `patterns` are fetched. UserError where it
    is none."""
    folder = _resolved(name, patterns)
    if (folder / INDEX_NAME).is_file():
        read_model_index(folder)
    start = StartFolder(name, folder, (folder / INDEX_NAME).is_file())
    path = start.transformer / "config.json"
    found = read_mapping(path).get("kind") if path.is_file() else None
    if found not in TRANSFORMER_KINDS:
        holds = f"holds kind {found!r}" if path.is_file() else "is not there"
        raise UserError(f"init_from {name}: neither a model folder ({INDEX_NAME}) nor one of a transformer: {path} {holds}, "
                        f"expected {' or '.join(TRANSFORMER_KINDS)}; give the folder that training wrote as RUN/model")
    return start


def find_tokenizer(name: str, patterns: tuple[str, ...] = TOKENIZER_FILES) -> Path:
    """The image tokenizer's folder that init_from names: the folder itself, or tokenizer_image of a whole model folder."""
    folder = _resolved(name, patterns)
    if not (folder / INDEX_NAME).is_file():
        return folder
    read_model_index(folder)
    return folder / IMAGE_FOLDER


def refuse_own_run(name: str, folder: Path, run_dir: str) -> None:
    """UserError when the folder that a fresh run begins from is its run_dir or lies there: a fresh start puts aside what a run
    folder holds, so the model would be taken apart."""
    if folder.resolve().is_relative_to(Path(run_dir).resolve()):
        raise UserError(f"init_from {name}: lies in run_dir {run_dir}, where a fresh run puts aside what is there; give "
                        "another --run_dir")


def _resolved(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        return resolve_folder(name, patterns=patterns)
    except MissingFileError as error:
        raise MissingFileError(f"init_from {error}") from None
    except UserError as error:
        raise UserError(f"init_from {error}") from None


def facts_of_run(run_dir: str | Path, resume: str) -> dict[str, Any] | None:
    """What the newest checkpoint in a run folder says of its run; None where no run is continued."""
    if resume == "never":
        return None
    for path in sorted(Path(run_dir).glob(f"checkpoints/step-*/{MANIFEST}"), reverse=True):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # RunState says what is wrong with it
        if isinstance(facts, dict) and isinstance(facts.get("model"), dict):
            return facts
    return None


def _facts(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """facts_of_run of a config that is still plain values."""
    run_dir, checkpoint = values.get("run_dir"), values.get("checkpoint")
    resume = checkpoint.get("resume", "auto") if isinstance(checkpoint, dict) else getattr(checkpoint, "resume", "auto")
    return facts_of_run(run_dir, str(resume)) if isinstance(run_dir, str) else None


def tokenizer_of_start(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config, as plain values, of the image tokenizer that a recipe with init_from begins with."""
    facts = _facts(values)
    base = facts["model"] if facts else read_mapping(find_tokenizer(str(values["init_from"]), CONFIGS) / "config.json")
    return {name: value for name, value in base.items() if name != "schema_version"}


def with_start(values: dict[str, Any]) -> dict[str, Any]:
    """A transformer's recipe with init_from, with what is not described in it: the model, and the kind of text input."""
    model, text = values.get("model") or {}, values.get("text") or {}
    lacks_model = isinstance(model, dict) and not {"kind", "preset"} & set(model)
    lacks_text = isinstance(text, dict) and not {"kind", "start_from"} & set(text)
    if not lacks_model and not lacks_text:
        return values
    facts = _facts(values)
    start = None if facts else find_start(str(values["init_from"]), CONFIGS)
    if lacks_model:
        config = start.config() if start else None
        theirs = {"kind": config.kind, **config.plain()} if config else (facts or {})["model"]
        model = {**{name: value for name, value in theirs.items() if name not in DERIVED}, **model}
    folder = (start.folder if start.whole else None) if start else Path(values["run_dir"])
    if lacks_text and folder is not None:
        text = {**_text_input(folder / TEXT_FOLDER), **text}
    return {**values, "model": model, "text": text}


def _text_input(folder: Path) -> dict[str, Any]:
    """text.kind of a text tokenizer's folder; of a frozen text encoder also where it is, and how it pads."""
    kind = read_mapping(folder / "config.json").get("kind")
    if kind != FrozenTextEncoder.kind:
        return {"kind": kind}
    encoder = read_config(folder, kind, FrozenTextConfig)
    return {"kind": kind, "encoder": encoder.name, "padding": encoder.padding}
