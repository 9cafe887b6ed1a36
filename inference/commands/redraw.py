"""`tokenloom generate --from-image`: requests of the recipes that an image file carries."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.commands.options import WEIGHTS, given_params
from inference.image_files.fingerprint import model_fingerprint
from inference.image_files.read import image_format, read_image_file, read_recipes
from inference.image_files.recipe import Recipe
from inference.requests import AskedRequest, PromptRequest
from inference.shipped import default_model_folder
from tokenloom_common.errors import MissingFileError, UserError, choose


@dataclass(frozen=True)
class Origin:
    """The file of --from-image: its name in messages, its recipes and its format."""

    name: str
    recipes: list[Recipe]
    output_format: str

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the model that drew all of it."""
        return self.recipes[0].model_fingerprint


def read_origin(file: str) -> Origin:
    """Read the file of --from-image. UserError for one that cannot be drawn again.

    A line on stderr names what a newer version wrote and this one does not know.
    """
    if not file:  # Path("") would be the working directory
        raise UserError("--from-image is empty; give a file")
    name = f"--from-image {file}"
    data = read_image_file(Path(file), "--from-image")
    recipes = read_recipes(data, name)
    first = recipes[0]
    for recipe in recipes:
        if (recipe.model, recipe.model_fingerprint) != (first.model, first.model_fingerprint):
            raise UserError(f"{name}: its pictures were drawn by several models; "
                            "give the pictures one by one")
        weights = recipe.extra.get("weights")
        if weights is not None:
            choose({known: known for known in WEIGHTS}, weights, f"weights in {name}:")
        if weights != first.extra.get("weights"):
            raise UserError(f"{name}: its pictures were drawn with several kinds of weights; "
                            "give the pictures one by one")
    unknown = sorted({name for recipe in recipes for name in recipe.unknown_fields()})
    if unknown:
        print(f"tokenloom generate: {name}: this version does not know {', '.join(unknown)} of the "
              "recipe; the picture may differ", file=sys.stderr)
    return Origin(name, recipes, image_format(data, name))


def take_from(origin: Origin, args: argparse.Namespace) -> None:
    """Set the options that decide how the model is loaded, where they are not given."""
    first = origin.recipes[0]
    if args.output_format is None:
        args.output_format = origin.output_format
    if args.weights is None:
        args.weights = first.extra.get("weights")
    if args.matcher is None and args.rerank_from is not None:
        args.matcher = _matcher_of(origin)
    if args.model is None:
        args.model = _model_of(origin)
    elif args.model == first.model and args.revision is None:
        args.revision = first.extra.get("revision")


def _matcher_of(origin: Origin) -> str:
    """Return the folder of the matcher that chose a picture; a folder alone, as `_model_of`."""
    matcher = origin.recipes[0].extra.get("matcher")
    if matcher is None:
        raise UserError(f"{origin.name}: its recipe names no matcher for --rerank-from; give one: "
                        "--matcher DIR")
    if not matcher or not Path(matcher).is_dir():
        raise MissingFileError(f"{origin.name}: its matcher {matcher!r} is no folder here; say "
                               "where it is: --matcher DIR")
    return matcher


def _model_of(origin: Origin) -> str | None:
    """Return the model folder that drew a picture, None for the one that ships with Tokenloom.

    A folder alone: a picture that somebody sent must not make this machine fetch a hub model.
    """
    model = origin.recipes[0].model
    if model is None or (model and Path(model).is_dir()):
        return model
    try:
        shipped = default_model_folder()
    except MissingFileError:
        shipped = None
    if shipped is not None and model_fingerprint(shipped) == origin.fingerprint:
        return None
    raise MissingFileError(f"{origin.name}: was drawn by the model {model!r}, and there is no such "
                           "folder here; say where it is, or which model to take: --model")


def warn_of_other_model(origin: Origin, fingerprint: str) -> None:
    """Print one line if the model that was loaded is not the one that drew the file."""
    if origin.fingerprint is None:
        print(f"tokenloom generate: {origin.name}: does not say which weights drew it (no "
              "fingerprint); the picture may differ", file=sys.stderr)
    elif origin.fingerprint != fingerprint:
        print(f"tokenloom generate: {origin.name}: was drawn by another model (fingerprint "
              f"{origin.fingerprint}, this one has {fingerprint}); the picture will differ",
              file=sys.stderr)


def redrawn_requests(origin: Origin, args: argparse.Namespace,
                     layout: Any) -> list[AskedRequest]:
    """Return requests for a file's pictures.

    Options that are given replace what the recipes say. UserError for a value out of range.
    """
    wanted = []
    for recipe in origin.recipes:
        request = PromptRequest(
            recipe.drawn_prompt, args.num_images,
            recipe.seed if args.seed is None else args.seed,
            given_params(args, recipe.params, args.guidance),
            recipe.negative_prompt if args.negative_prompt is None else args.negative_prompt,
            recipe.extra.get("layout") if layout is None else layout)
        wanted += [AskedRequest(replace(request, prompt=prompt), prompt) for prompt in args.prompt]
        if not args.prompt:
            wanted.append(AskedRequest(request, recipe.prompt))
    return wanted


def as_it_was(recipe: Recipe, origin: Origin) -> Recipe:
    """Return the file's own recipe for a picture that is drawn as the file's was.

    So its score, and the name by which its model went, stay, and its bytes are the same again.
    """
    for own in origin.recipes:
        if own.identity() == recipe.identity() and own.model_fingerprint is not None:
            version = {name: recipe.extra[name] for name in ("tokenloom",) if name in own.extra}
            return replace(own, extra=own.extra | version)
    return recipe

