"""Hooks applied: prompts prepared before they are drawn, images screened after.

    hooks = Hooks(load_expander("mine:expand"), load_safety(["words"]))
    prepared = hooks.prepare("a hovercraft")      # drawn, or refused
    reasons = hooks.check_images(images)          # None for those that may be given out
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.hooks.expansion import PromptExpander, checked_expansion
from inference.hooks.safety import Filters, SafetyFilter
from inference.hooks.user_code import UserFunction

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt as it was asked for, and what the hooks make of it.

    revised: the text to be drawn, None where it is the prompt itself. note: said to the user.
    refusal: why it must not be drawn, None where it may be.
    """

    prompt: str
    revised: str | None = None
    note: str | None = None
    refusal: str | None = None

    @property
    def drawn(self) -> str:
        """The text to be drawn."""
        return self.prompt if self.revised is None else self.revised


@dataclass(frozen=True)
class Refusal:
    """A prompt, or the image of a seed, that a safety filter refused, and why in one line."""

    prompt: str
    reason: str
    seed: int | None = None  # None: the prompt, before anything was drawn

    def __str__(self) -> str:
        """Return the refusal as it is said to the user."""
        shown = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:60]}..."
        what = "the prompt was" if self.seed is None else f"the picture of seed {self.seed} was"
        return f"'{shown}': {what} refused ({self.reason})"


@dataclass(frozen=True)
class Hooks:
    """Checks and rewrites prompts, and checks images; does nothing by default.

    say: told each note of the expander.
    """

    expander: PromptExpander | None = None
    safety: SafetyFilter | None = None
    say: Callable[[str], object] = log.warning

    def prepare(self, prompt: str, revised: str | None = None) -> PreparedPrompt:
        """Check a prompt, expand it, and check what it became.

        revised: what it became earlier, which is not expanded again. HookFailedError for a hook
        that fails: a prompt is never let through by that.
        """
        refusal = self._refusal(prompt)
        if refusal is not None:
            return PreparedPrompt(prompt, refusal=refusal)
        if revised is not None:
            return PreparedPrompt(prompt, revised, refusal=self._refusal(revised))
        if self.expander is None:
            return PreparedPrompt(prompt)

        expand = UserFunction(self.expander.expand, type(self.expander).__name__)
        drawn, note = checked_expansion(expand(prompt), expand.name)
        if note:
            self.say(note)
        if drawn == prompt:
            return PreparedPrompt(prompt, note=note)
        return PreparedPrompt(prompt, drawn, note, self._refusal(drawn))

    def check_images(self, images: Sequence[Image.Image]) -> list[str | None]:
        """Return for each image why it must not be given out; None where it may be."""
        if self.safety is None or not images:
            return [None] * len(images)
        return self._filter().check_images(images)

    def _refusal(self, prompt: str) -> str | None:
        return None if self.safety is None else self._filter().check_prompt(prompt)

    def _filter(self) -> SafetyFilter:
        """Return the filter, with its answers checked."""
        assert self.safety is not None
        if isinstance(self.safety, Filters):
            return self.safety
        return Filters({type(self.safety).__name__: self.safety})
