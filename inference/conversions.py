"""Conversions of other projects' checkpoints as the commands see them: kinds, and what may be
replaced. Free of torch, so that a command can refuse before it is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError
from tokenloom_common.outputs import check_output_file, check_output_folder

CHECKPOINT_KINDS: dict[str, str] = {
    "taming": "VQGAN of taming-transformers or latent diffusion (.ckpt or .safetensors, with its "
              "yaml), GumbelVQ too",
    "llamagen-vq": "LlamaGen's VQ-16 and VQ-8 (.pt)",
    "llamagen-gpt": "LlamaGen's transformers, of classes or of text (.pt)",
    "diffusers-vq": "a VQModel folder of diffusers (aMUSEd's too)",
    "min-dalle": "min-dalle's encoder.pt, decoder.pt, detoker.pt, vocab.json and merges.txt",
    "dalle-mini": "DALL-E mini or mega: flax_model.msgpack with its config.json and tokenizer",
    "vqgan-jax": "DALL-E mini's image tokenizer: flax_model.msgpack with its config.json",
    "janus-vq": "the image tokenizer of Janus, as transformers or DeepSeek saves it",
}
"""Kind -> description. Its converter is `convert` in checkpoints/formats/KIND.py (with _ for -)."""

_TORCH_ENDINGS = (".pt", ".pth", ".safetensors")
EXPORT_ENDINGS: dict[str, tuple[str, ...]] = {
    "taming": (".ckpt", ".pt", ".safetensors"),
    "diffusers-vq": (),  # a folder
    "llamagen-vq": _TORCH_ENDINGS,
    "llamagen-gpt": _TORCH_ENDINGS,
    "float16": (),  # a folder of ours
}
"""Kind of `checkpoints.export.EXPORTERS` -> endings of the file that it writes."""

OWN_NAMES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "README.md",
             "tokenizer_image", "seq2seq", "text_tokenizer", "model_index.json",
             "generation_config.json")
"""Name patterns of a folder that a conversion writes: of a part alone, or of a whole model."""


def check_converted_folder(source: str | Path, out: str | Path) -> Path:
    """Return the folder to write. UserError if it cannot be, or if something would be lost.

    That is: the source, another project's model, or files of any other kind.
    """
    check_output_folder("OUT", out, ("*",))  # whatever it holds, which the rest is about
    # resolved: a link or a relative path may lead to the same folder
    folder, source_path = Path(out).resolve(), Path(source).resolve()
    if str(source) and (folder == source_path or folder in source_path.parents):
        raise UserError(f"{out}: holds the source {source}, which would "
                        "be lost; give another folder")
    # most projects call it so: atomic_folder would take it for the file of an older conversion
    if (folder / "config.json").is_file() and not is_ours(folder):
        raise UserError(f"{out}: holds another project's config.json, which would be lost; give "
                        "another folder")
    return check_output_folder("OUT", out, OWN_NAMES)


def check_exported_path(kind: str, out: str | Path) -> Path:
    """Return the path to write. UserError if it cannot be, or exists: nothing is overwritten."""
    path = Path(out)
    endings = EXPORT_ENDINGS[kind]
    if str(out) and os.path.lexists(path):
        raise UserError(f"OUT {out}: exists already; give another name, nothing is overwritten")
    if not endings:
        return check_output_folder("OUT", out, ())

    check_output_file("OUT", out)
    if path.suffix not in endings:
        raise UserError(f"OUT {out}: give a file that ends in {', '.join(endings)}")
    beside = path.with_suffix(".yaml")
    if kind == "taming" and beside.exists():
        raise UserError(f"{beside}: exists already, and the yaml is written beside {path.name}; "
                        "give another name")
    return path


def is_ours(folder: Path) -> bool:
    """Whether a folder has a config.json that Tokenloom wrote."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        return {"kind", "schema_version"} <= read_mapping(path).keys()
    except UserError:  # another project's file may hold anything
        return False
