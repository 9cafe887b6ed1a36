"""Prompt expansion: a prompt is rewritten before it is drawn, by a user's function or a built-in.

DALL-E 3 and Midjourney do so; what was really drawn is the revised prompt of a result.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from inference.hooks.user_code import HookFailedError, UserFunction

MAX_PROMPT_CHARACTERS = 10_000
"""Of a prompt that is drawn, as it was given or expanded."""


class Expansion(NamedTuple):
    """A prompt to be drawn, and a note to the user why it is another one than they gave."""

    prompt: str
    note: str | None = None


class PromptExpander(Protocol):
    """Rewrites prompts."""

    def expand(self, prompt: str) -> Expansion:
        """Return the prompt to be drawn; the given one where nothing is to be changed."""
        ...


class FunctionExpander:
    """The expander that a user's function of one prompt makes."""

    def __init__(self, function: UserFunction) -> None:
        self.function = function

    def expand(self, prompt: str) -> Expansion:
        """Call the function. HookFailedError if it raises, or returns no text."""
        return checked_expansion(self.function(prompt), self.function.name)


def checked_expansion(value: object, name: str) -> Expansion:
    """Return what an expander returned as an Expansion.

    HookFailedError for anything but text, and for more than MAX_PROMPT_CHARACTERS.
    """
    expansion = Expansion(value) if isinstance(value, str) else value
    if not isinstance(expansion, Expansion):
        raise HookFailedError(f"{name}: must return text or an Expansion, returned "
                              f"{type(value).__name__}")
    prompt, note = expansion
    if not isinstance(prompt, str) or not (note is None or isinstance(note, str)):
        raise HookFailedError(f"{name}: returned an Expansion of {type(prompt).__name__} and "
                              f"{type(note).__name__}; both must be text, or the note None")
    if not prompt.strip():
        raise HookFailedError(f"{name}: returned empty text")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise HookFailedError(f"{name}: returned {len(prompt):,} characters, the limit is "
                              f"{MAX_PROMPT_CHARACTERS:,}")
    return expansion
