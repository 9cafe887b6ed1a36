"""Write generated images: file names, PNG metadata, output folders."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from inference.model_folder import (
    toolkit_version,
)
from inference.sampling import SamplingParams
from tokenloom_common.errors import RunFailedError, UserError

PNG_KEY = "tokenloom"  # text chunk with everything needed to make the picture again


def _about(args: argparse.Namespace, prompt: str, seed: int, params: SamplingParams, negative_prompt: str | None,
           **more: Any) -> PngInfo:
    """Everything that is needed to make a picture again, as a text chunk."""
    info = PngInfo()
    info.add_text(PNG_KEY, json.dumps({
        "prompt": prompt, "seed": seed, **params.plain(), "model": str(args.model),
        **({"revision": args.revision} if args.revision else {}), **({"weights": args.weights} if args.weights else {}),
        **({"negative_prompt": negative_prompt} if negative_prompt is not None else {}), **more,
        "tokenloom": toolkit_version(), "digitalSourceType": "trainedAlgorithmicMedia"}))
    return info


def _output_folder(name: str) -> Path:
    out = Path(name)
    if not name:
        raise UserError("--out is empty; give a folder")
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file; give a folder")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # says no before anything is sampled
            pass
    except OSError as error:
        raise UserError(f"--out {name[:200]}: cannot be written to ({error.strerror})") from None
    return out


def _save_png(picture: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Whole or not at all. RunFailedError with the path and the reason."""
    aside = path.with_name(f".{path.name[:100]}.tmp")
    try:
        picture.save(aside, format="PNG", pnginfo=info)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunFailedError(f"{path}: could not be written ({error.strerror}); pictures saved before it are whole") from None


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60]
    return words.encode()[:180].decode(errors="ignore") or "picture"  # file systems limit the bytes of a name, mostly to 255


def _free_name(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
