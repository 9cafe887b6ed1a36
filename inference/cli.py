"""The commands generate, reconstruct and info."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from inference.attention_maps import word_positions
from inference.model_folder import (
    load_image_tokenizer,
    load_model_folder,
    toolkit_version,
)
from inference.pipeline import TextToImage
from inference.requests import PromptRequest, check_counts, check_prompts, read_prompts
from inference.results import GenerationResult
from inference.sampling import SamplingParams
from inference.sampling_options import (
    add_sampling_options,
    add_speed_options,
    calibrate_threads,
    check_speed_options,
    given_params,
)
from inference.scorer import check_candidates
from tokenizer_image import ImageTokenizer
from tokenizer_image.images import (
    BadImageError,
    float_to_pixels,
    image_grid,
    image_to_pixels,
    open_image,
    pixels_to_float,
    pixels_to_images,
)
from tokenizer_image.tiling import decode_tiled, encode_tiled
from tokenloom_common.errors import OneLineParser, RunFailedError, UserError, one_line
from tokenloom_common.progress import progress

PNG_KEY = "tokenloom"  # text chunk with everything needed to make the picture again


def _parser(name: str, text: str, examples: str) -> OneLineParser:
    return OneLineParser(prog=f"tokenloom {name}", description=text, epilog=f"examples:\n{examples}", allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """--revision, beside an option that takes a hub id."""
    parser.add_argument("--revision", help="branch, tag or commit of a hub id (default: main)")


def choose_device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no usable GPU; leave --device out, or say --device cpu")
        torch.zeros(1, device=device).item()  # torch knows devices that this machine or this build does not have
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not a device of this machine; use cpu, cuda or cuda:0") from None
    return name


def generate(argv: Sequence[str] | None = None) -> int:
    """`tokenloom generate`: one PNG a picture, a grid, and the files' names on stdout."""
    parser = _parser("generate", "Sample pictures for captions.",
                     '  tokenloom generate "a red heart" --model demo/model --out pictures\n'
                     '  tokenloom generate "a cat" --model demo/model --num-images 4 --guidance 2 --seed 7 --out pictures\n'
                     "  tokenloom generate --prompts prompts.jsonl --model demo/model --out pictures")
    parser.add_argument("prompt", nargs="*", help="one or more captions, each in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="captions from a file instead: a caption a line, or .jsonl with "
                        'objects such as {"prompt": "a red heart", "seed": 7, "num_images": 2, "guidance_scale": 3}; what a '
                        "line does not say comes from the options")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    add_revision(parser)
    parser.add_argument("--out", required=True, help="folder for the pictures; files there are never overwritten")
    parser.add_argument("--num-images", type=int, default=1, help="pictures per caption (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    add_sampling_options(parser)
    parser.add_argument("--negative-prompt", help="what guidance leads away from (default: no caption)")
    parser.add_argument("--layout", help="for models with a layout: a picture (colours), or a .json file of class numbers, "
                        "row after row (default: sampled)")
    parser.add_argument("--attention", action="append", metavar="WORD", help="also save where the picture attended to "
                        "a word of the caption; may be given several times")
    parser.add_argument("--rerank-from", type=int, metavar="N", help="draw N candidates per caption and keep the --num-images "
                        "that a matcher finds to fit it best (needs --matcher)")
    parser.add_argument("--matcher", metavar="DIR", help="folder of a matcher (RUN/model of train_matcher), a CLIP or a SigLIP")
    parser.add_argument("--text-encoder", help="where the model's frozen text encoder is, if not where it was at training")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures decoded at a time (default 32)")
    add_speed_options(parser)
    parser.add_argument("--no-metadata", action="store_true", help="leave prompt, seed and parameters out of the PNG files")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    check_counts(args.num_images, args.batch_size, args.seed)
    _check_source(args)
    if (args.rerank_from is None) != (args.matcher is None):
        raise UserError("--rerank-from N and --matcher DIR belong together: N candidates, and what chooses among them")
    check_candidates(args.rerank_from, args.num_images)
    check_speed_options(args)
    layout = None if args.layout is None else _read_layout_file(args.layout)
    model = TextToImage.from_pretrained(args.model, device, args.revision, args.text_encoder, args.matcher, args.weights)
    params = given_params(args, model.default_params, args.guidance)
    requests = [] if args.prompts is None else read_prompts(
        Path(args.prompts), PromptRequest("", args.num_images, args.seed, None, args.negative_prompt, layout), params)
    if device == "cpu" and args.threads is None:
        pictures = sum(r.num_images for r in requests) or args.rerank_from or args.num_images
        calibrate_threads(model, min(args.batch_size, pictures), params)
    for prompt in args.prompt:
        for word in args.attention or []:  # a word that is not there is refused before anything is sampled
            word_positions(model.text_tokenizer, prompt, word)
    out = _output_folder(args.out)
    if args.prompts is not None:
        return _generate_file(model, requests, out, args)
    result = _generate_with_progress(model, args, params, layout)
    for path in _save_pictures(result, out, args):
        print(path)
    return 0


def _check_source(args: argparse.Namespace) -> None:
    """UserError unless captions come from the command line or from a file, and the options suit."""
    if args.prompts is None:
        check_prompts(args.prompt)
        return
    if args.prompt:
        raise UserError("captions and --prompts: give one of them")
    for name in ("attention", "rerank_from", "jacobi"):
        if getattr(args, name) not in (None, 1):
            raise UserError(f"--{name.replace('_', '-')} does not go with --prompts; give captions on the command line")


def _generate_file(model: TextToImage, requests: list[PromptRequest], out: Path, args: argparse.Namespace) -> int:
    """Pictures of a prompts file, saved as each ends; 1 if one could not be drawn."""
    total, failed = sum(request.num_images for request in requests), 0
    for picture in progress(model.generate_many(requests, args.batch_size), "generate", total=total, unit="picture"):
        if picture.image is None:
            print(f"tokenloom generate: '{picture.prompt[:60]}', seed {picture.seed}: {picture.reason}", file=sys.stderr)
            failed += 1
            continue
        path = _free_name(out, f"{_slug(picture.prompt)}-seed{picture.seed}")
        about = _about(args, picture.prompt, picture.seed, picture.params, picture.negative_prompt)
        _save_png(picture.image, path, None if args.no_metadata else about)
        print(path)
    return 1 if failed else 0


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


def _read_layout_file(name: str) -> Any:
    """A picture, or the numbers of a .json file."""
    path = Path(name)
    if path.suffix.lower() != ".json":
        try:
            return open_image(path)
        except (OSError, BadImageError) as error:
            raise UserError(f"--layout {name}: neither a picture nor a .json file ({one_line(error)})") from None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--layout {name}: cannot be read ({one_line(error)})") from None


def _generate_with_progress(model: TextToImage, args: argparse.Namespace, params: SamplingParams,
                            layout: Any) -> GenerationResult:
    """One prompt at a time, so that the bar moves."""
    parts = [model.generate(prompt, num_images=args.num_images, params=params, seed=args.seed, batch_size=args.batch_size,
                            negative_prompt=args.negative_prompt, layout=layout, rerank_from=args.rerank_from,
                            jacobi=args.jacobi)
             for prompt in progress(args.prompt, "generate", unit="caption")]
    layouts = [part.layouts for part in parts if part.layouts is not None]
    return GenerationResult([i for p in parts for i in p.images], torch.cat([p.image_tokens for p in parts]),
                            [t for p in parts for t in p.prompts], [s for p in parts for s in p.seeds], params,
                            torch.cat(layouts) if layouts else None, model,
                            None if args.rerank_from is None else [s for p in parts for s in p.scores or []])


def _save_pictures(result: GenerationResult, out: Path, args: argparse.Namespace) -> list[Path]:
    paths = []
    for number, (prompt, seed, picture) in enumerate(zip(result.prompts, result.seeds, result.images, strict=True)):
        info = None
        if not args.no_metadata:
            chosen = {"score": result.scores[number], "matcher": str(args.matcher)} if result.scores else {}
            info = _about(args, prompt, seed, result.params, args.negative_prompt, **chosen)
        path = _free_name(out, f"{_slug(prompt)}-seed{seed}")
        _save_png(picture, path, info)
        paths.append(path)
        for word in args.attention or []:
            path = _free_name(out, f"{_slug(prompt)}-seed{seed}-attention-{_slug(word)}")
            _save_png(result.attention_overlay(word, number), path)
            paths.append(path)
    if len(result.images) > 1:
        columns = min(args.num_images, 8) if args.num_images > 1 else min(len(result.images), 8)
        path = _free_name(out, "grid")
        _save_png(image_grid(result.images, columns=columns), path)
        paths.append(path)
    return paths


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


def reconstruct(argv: Sequence[str] | None = None) -> int:
    """`tokenloom reconstruct`: each picture beside what the tokenizer keeps of it, with its PSNR on stdout."""
    parser = _parser("reconstruct", "Send pictures through the image tokenizer and back: original left, reconstruction right.",
                     "  tokenloom reconstruct cat.png dog.jpg --model demo/model --out reconstructions\n"
                     "  tokenloom reconstruct photo.jpg --model demo/model --tiles --out reconstructions")
    parser.add_argument("image", nargs="+", help="picture files")
    parser.add_argument("--model", required=True, help="model folder or hub id, or that of an image tokenizer")
    add_revision(parser)
    parser.add_argument("--out", required=True, help="folder for the pictures; files there are never overwritten")
    parser.add_argument("--tiles", action="store_true", help="keep each picture's own size, in overlapping tiles of the "
                        "tokenizer's resolution (default: its centre square, resized to that resolution)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    tokenizer = load_image_tokenizer(args.model, device, args.revision)
    tokenizer.config.check_encodes(args.model)
    out = _output_folder(args.out)
    failed = 0
    for name in progress(args.image, "reconstruct", unit="picture"):
        try:
            picture = open_image(Path(name))
            pixels = (_whole_cells(picture, name, tokenizer) if args.tiles
                      else image_to_pixels(picture, tokenizer.config.resolution))
        except BadImageError as error:
            if len(args.image) == 1:
                raise
            print(f"tokenloom reconstruct: skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        both, decibel = _both(tokenizer, pixels, args.tiles, device)
        path = _free_name(out, f"{Path(name).stem}-reconstruction")
        _save_png(both, path)
        print(f"{path}\t{decibel:.2f} dB")
    if failed == len(args.image):
        raise UserError(f"none of {failed} pictures could be read")
    return 1 if failed else 0


def _whole_cells(picture: Image.Image, name: str, tokenizer: ImageTokenizer) -> numpy.ndarray:
    """The picture at its own size, uint8 [H, W, 3], its sides cut to whole code cells. BadImageError if it is too small."""
    cell, side = tokenizer.config.downsampling, tokenizer.config.resolution
    width, height = (length // cell * cell for length in picture.size)
    if min(width, height) < side:
        raise BadImageError(name, "too small",
                            f"{picture.size[0]} x {picture.size[1]} pixels, tiles need {side} x {side} or more; "
                            "leave --tiles out")
    left, top = (picture.size[0] - width) // 2, (picture.size[1] - height) // 2
    return numpy.array(picture.convert("RGB").crop((left, top, left + width, top + height)))


def _both(tokenizer: ImageTokenizer, pixels: numpy.ndarray, tiled: bool, device: str) -> tuple[Image.Image, float]:
    """Original and reconstruction side by side, and the PSNR in dB; pixels [H, W, 3]."""
    original = torch.from_numpy(pixels)[None]  # [1, H, W, 3]
    image = pixels_to_float(original).to(device)
    rebuilt = decode_tiled(tokenizer, encode_tiled(tokenizer, image)) if tiled else tokenizer.decode(tokenizer.encode(image))
    rebuilt = float_to_pixels(rebuilt).cpu()
    error = float((original.double() - rebuilt.double()).square().mean())
    decibel = 100.0 if error == 0 else min(100.0, float(10 * numpy.log10(255.0**2 / error)))
    return image_grid(pixels_to_images(torch.cat([original, rebuilt])), columns=2), decibel


def info(argv: Sequence[str] | None = None) -> int:
    """`tokenloom info`: the parts of a model folder, their sizes and defaults."""
    parser = _parser("info", "Say what a model folder holds; it is loaded and checked whole.",
                     "  tokenloom info demo/model\n  tokenloom info demo/model --json")
    parser.add_argument("folder", help="model folder or hub id")
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args(argv)
    model = load_model_folder(args.folder, revision=args.revision)
    report = {
        "folder": str(model.folder),
        "image_tokenizer": {"kind": model.image_tokenizer.kind, "parameters": _count(model.image_tokenizer),
                            **model.image_tokenizer.config.plain()},
        "seq2seq": {"kind": model.seq2seq.kind, "parameters": _count(model.seq2seq), **model.seq2seq.config.plain()},
        "text_tokenizer": model.text_tokenizer.config.plain(),
        "generation": model.generation.plain(),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for part, values in report.items():
        if isinstance(values, dict):
            print(f"{part}:")
            for key, value in values.items():
                print(f"  {key:<24} {f'{value:,}' if key == 'parameters' else value}")
        else:
            print(f"{part}: {values}")
    return 0


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
