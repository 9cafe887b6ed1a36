"""Safety filters: a prompt is refused before it is drawn, a picture before it is given out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from inference.hooks.user_code import HookFailedError, UserFunction, load_function
from tokenloom_common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

WORDS = "words"
NSFW = "nsfw"
BUILT_IN = (WORDS, NSFW)
"""Names of --safety; anything else is module:function."""


class SafetyFilter(Protocol):
    """Refuses prompts and pictures, each with its reason in one line."""

    def check_prompt(self, prompt: str) -> str | None:
        """Return why a prompt is refused; None where it may be drawn."""
        ...

    def check_images(self, images: Sequence[Image.Image]) -> list[str | None]:
        """Return, for each image, why it is refused; None where it may be given out."""
        ...


class Filters:
    """Several filters as one, each by its name: the first that refuses says why."""

    def __init__(self, filters: dict[str, SafetyFilter]) -> None:
        self.filters = filters

    def check_prompt(self, prompt: str) -> str | None:
        """Return the first filter's reason. HookFailedError for a filter that does not work."""
        for name, one in self.filters.items():
            what = f"--safety {name}: check_prompt"
            reason = UserFunction(one.check_prompt, what)(prompt)
            _check_reason(reason, what)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def check_images(self, images: Sequence[Image.Image]) -> list[str | None]:
        """Return the first filter's reason for each image, as check_prompt does."""
        reasons: list[str | None] = [None] * len(images)
        for name, one in self.filters.items():
            what = f"--safety {name}: check_images"
            found = UserFunction(one.check_images, what)(images)
            if not isinstance(found, list) or len(found) != len(images):
                count = f"{len(found)} values" if isinstance(found, list) else type(found).__name__
                raise HookFailedError(f"{what} must return a list of one value per image, returned "
                                      f"{count} for {len(images)} images")
            for number, reason in enumerate(found):
                _check_reason(reason, what)
                if reason is not None and reasons[number] is None:
                    reasons[number] = f"{name}: {reason}"
        return reasons


def load_safety(names: Sequence[str], words_file: str | None = None) -> SafetyFilter | None:
    """Return the filter that --safety names: BUILT_IN ones and module:function; None for none.

    A user's function takes no argument and returns a SafetyFilter. words_file: --safety-words,
    words and phrases that WORDS refuses as well. UserError for an unknown name, a package that is
    not installed, a function that cannot be imported, a file that cannot be read.
    """
    if words_file is not None and WORDS not in names:
        raise UserError(f"--safety-words {words_file}: belongs to --safety {WORDS}")
    if not names:
        return None
    return Filters({name: _load_filter(name, words_file) for name in names})


def _load_filter(name: str, words_file: str | None) -> SafetyFilter:
    if ":" in name:
        return _user_filter(name)
    if name == WORDS:
        from inference.hooks.word_list import load_word_list

        return load_word_list(words_file)
    if name == NSFW:
        from inference.hooks.nsfw import load_nsfw

        return load_nsfw()
    raise UserError(f"--safety {name!r}: unknown; give {' or '.join(BUILT_IN)}, or a filter of "
                    "your own as module:function")


def _user_filter(spec: str) -> SafetyFilter:
    """Return the filter that a user's function makes."""
    function = load_function(spec, "--safety", arguments=0)
    made = function()
    for method in ("check_prompt", "check_images"):
        if not callable(getattr(made, method, None)):
            raise UserError(f"{function.name}: must return an object with check_prompt and "
                            f"check_images, {type(made).__name__} has no {method}")
    return made


def _check_reason(reason: object, what: str) -> None:
    if not (reason is None or isinstance(reason, str)):
        raise HookFailedError(f"{what} must return text or None, returned {type(reason).__name__}")
