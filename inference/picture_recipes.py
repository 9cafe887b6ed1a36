"""Recipes of images as a loaded model draws them."""

from __future__ import annotations

from collections.abc import Sequence

from inference.image_files.fingerprint import model_fingerprint
from inference.image_files.recipe import Recipe
from inference.layouts import read_layout
from inference.model_folder import toolkit_version
from inference.pipeline import TextToImage
from inference.requests import PromptRequest


class RecipeMaker:
    """Make recipes of one model's images.

    name: what the recipe calls the model, None for the one that ships with Tokenloom. revision: of
    a hub id. matcher: the folder of what scores candidates.
    """

    def __init__(self, model: TextToImage, name: str | None = None, revision: str | None = None,
                 matcher: str | None = None) -> None:
        self.model = model
        self.name = name
        self.matcher = matcher
        self.fingerprint = model_fingerprint(model.parts.folder)
        self._facts = {"weights": model.weights, "image_tokens": model.seq2seq.config.num_tokens,
                       "tokenloom": toolkit_version()}
        if revision is not None:
            self._facts["revision"] = revision

    def recipes(self, request: PromptRequest, prompt: str | None = None) -> list[Recipe]:
        """Return the recipes of a request's images, in order.

        prompt: as it was asked for, where another one is drawn. UserError for a layout that the
        model cannot read.
        """
        seeds = [request.seed + index for index in range(request.num_images)]
        return self.of_seeds(request, seeds, prompt=prompt)

    def of_seeds(self, request: PromptRequest, seeds: Sequence[int],
                 scores: Sequence[float] | None = None, prompt: str | None = None) -> list[Recipe]:
        """Do what `recipes` does for images of these seeds, with the scores of the matcher."""
        asked = request.prompt if prompt is None else prompt
        revised = None if request.prompt == asked else request.prompt
        params = request.params or self.model.default_params
        # a sampled layout follows from the seed; one that was given is recorded
        layouts = read_layout(request.layout, self.model.seq2seq.config, len(seeds))
        recipes = []
        for number, seed in enumerate(seeds):
            extra = dict(self._facts)
            if layouts is not None:
                extra["layout"] = layouts[number].tolist()
            if scores is not None:
                extra |= {"score": scores[number], "matcher": self.matcher}
            recipes.append(Recipe(asked, seed, params, request.negative_prompt, revised, self.name,
                                  self.fingerprint, extra))
        return recipes
