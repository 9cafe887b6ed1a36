"""Where `tokenloom generate` puts its pictures: files with recipes, index.jsonl, the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from PIL import Image

from inference.commands.picture_files import save_picture, slug
from inference.commands.picture_index import PictureIndex, picture_key
from inference.commands.redraw import Origin, as_it_was
from inference.image_files.encode import FORMATS, encode_image
from inference.image_files.recipe import Recipe
from inference.requests import PromptRequest
from tokenizer_image.images import grid_size, image_grid
from tokenloom_common.errors import UserError

GRID_COLUMNS = 8  # at most


class PictureOutput:
    """A folder to which pictures are added, each printed when it is there.

    with_metadata: whether files carry their recipe; index.jsonl always does. origin: what is drawn
    again. with_grid: whether pictures are kept for `save_grid`.
    """

    def __init__(self, out: Path, output_format: str, with_metadata: bool,
                 origin: Origin | None = None, with_grid: bool = False) -> None:
        self.out = out
        self.output_format = output_format
        self.with_metadata = with_metadata
        self.origin = origin
        self.with_grid = with_grid
        self.index = PictureIndex(out)
        self._saved: list[tuple[Image.Image, Recipe]] = []
        self._known: set[str] | None = None  # files of the index, once `missing` has read it

    def save(self, image: Image.Image, recipe: Recipe) -> None:
        """Write a picture under a free name, and its line of the index."""
        if self.origin is not None:
            recipe = as_it_was(recipe, self.origin)
        if self.with_grid:
            self._saved.append((image, recipe))
        path = self._write(image, _stem(recipe), recipe, self._known)
        self.index.add(path, recipe)
        if self._known is not None:
            self._known.add(path.name)

    def save_overlay(self, image: Image.Image, recipe: Recipe, word: str) -> None:
        """Write a picture's attention to a word beside it."""
        self._write(image, f"{_stem(recipe)}-attention-{slug(word)}", None)

    def save_grid(self) -> None:
        """Write all pictures that were saved, if any, on a sheet that carries their recipes."""
        if not self._saved:  # all were refused
            return
        images = [image for image, _ in self._saved]
        recipes = [recipe for _, recipe in self._saved]
        self._write(image_grid(images, columns=grid_columns(recipes)), "grid", recipes)

    def missing(self, requests: Sequence[PromptRequest], recipes: Sequence[list[Recipe]]
                ) -> tuple[list[PromptRequest], list[list[Recipe]]]:
        """Return the requests, with their recipes, for which the folder holds no picture yet.

        Of a request that is there in part, what is left becomes requests of one picture each.
        """
        found, self._known = self.index.pictures()
        ending = FORMATS[self.output_format].ending
        left_requests: list[PromptRequest] = []
        left_recipes: list[list[Recipe]] = []
        for request, of_request in zip(requests, recipes, strict=True):
            left = []
            for recipe in of_request:
                key = picture_key(recipe, ending)
                if found[key] > 0:
                    found[key] -= 1  # a line that stands there twice is drawn twice
                else:
                    left.append(recipe)
            if len(left) == len(of_request):
                left_requests.append(request)
                left_recipes.append(of_request)
                continue
            for recipe in left:
                # the request may have a layout for each of its pictures
                layout = recipe.extra.get("layout")
                left_requests.append(
                    replace(request, num_images=1, seed=recipe.seed, layout=layout))
                left_recipes.append([recipe])
        return left_requests, left_recipes

    def _write(self, image: Image.Image, stem: str, recipe: Recipe | list[Recipe] | None,
               known: set[str] | None = None) -> Path:
        written = recipe if self.with_metadata else None
        data = encode_image(image, self.output_format, recipe=written)
        path = save_picture(data, self.out, stem, FORMATS[self.output_format].ending, known)
        print(path, flush=True)
        return path


def check_grid(recipes: Sequence[Recipe], side: int, output_format: str) -> None:
    """Raise UserError if the sheet of these pictures of `side` pixels is too large for a format."""
    width, height = grid_size(len(recipes), grid_columns(recipes), side, side)
    limit = FORMATS[output_format].max_side
    if max(width, height) > limit:
        raise UserError(f"--grid: the sheet would have {width:,} x {height:,} pixels, and "
                        f"{output_format} has at most {limit:,} a side; give --output-format png, "
                        "or fewer pictures")


def grid_columns(recipes: Sequence[Recipe]) -> int:
    """Return the columns of a grid: a row per prompt, or all in a row if each has one picture."""
    runs = [len(list(run)) for _, run in groupby(recipes, key=lambda recipe: recipe.prompt)]
    per_row = max(runs)
    return min(per_row if per_row > 1 else len(recipes), GRID_COLUMNS)


def _stem(recipe: Recipe) -> str:
    return f"{slug(recipe.prompt)}-seed{recipe.seed}"
