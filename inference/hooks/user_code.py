"""Functions that users bring as module:function: imported and checked, errors in one line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tokenloom_common.errors import RunFailedError, UserError, nearest_name, one_line


class HookFailedError(RunFailedError):
    """A user's hook raised, or returned what it must not; the message names it, file and line."""


class UserFunction(NamedTuple):
    """A function of a user's module, and how messages name it ("--expand mine:expand")."""

    call: Callable[..., Any]
    name: str

    def __call__(self, *arguments: Any) -> Any:
        """Call the function. HookFailedError for whatever it raises."""
        try:
            return self.call(*arguments)
        except HookFailedError:  # of a hook that this one calls, and names it
            raise
        # SystemExit: a hook that calls exit() must not end a server
        except (Exception, SystemExit) as error:
            raise HookFailedError(f"{self.name}: {_with_place(error)}") from None


def load_function(spec: str, option: str, arguments: int) -> UserFunction:
    """Import the function that `spec` ("module:function") names.

    The working directory comes first on Python's path, as for `python -m`. option: its name in
    messages, such as --expand. arguments: how many the function will be called with. UserError
    for a module that cannot be imported, or a function that is not there or takes others.
    """
    name = f"{option} {spec}"
    module_name, _, function_name = spec.partition(":")
    parts = module_name.split(".")
    if not function_name.isidentifier() or not all(part.isidentifier() for part in parts):
        raise UserError(f"{name}: give module:function, such as my_prompts:expand")

    module = _import(module_name, name)
    function = getattr(module, function_name, None)
    place = getattr(module, "__file__", None) or "built into Python"
    if function is None:
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UserError(f"{name}: {module_name} ({place}) has no {function_name}"
                        f"{nearest_name(function_name, own)}")
    if not callable(function):
        raise UserError(f"{name}: {function_name} in {place} is no function but "
                        f"{type(function).__name__}")
    _check_arguments(function, arguments, f"{name}: {function_name} in {place}")
    return UserFunction(function, name)


def _import(module_name: str, name: str) -> ModuleType:
    """Import a module of the working directory or of Python's path."""
    folder = os.getcwd()
    if "" not in sys.path and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # not that the module itself imports another one that is missing
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{name}: no module '{error.name}' in {folder} or among the installed "
                            "packages") from None
        raise UserError(f"{name}: {module_name} cannot be imported: {_with_place(error)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{name}: {module_name} cannot be imported: {_with_place(error)}") from None


def _check_arguments(function: Callable[..., Any], count: int, what: str) -> None:
    """Raise UserError unless a function can be called with `count` positional arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function of C, which tells nothing of its arguments
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        wanted = "one argument, the prompt" if count == 1 else "no argument"
        raise UserError(f"{what} must take {wanted} ({error})") from None


def _with_place(error: BaseException) -> str:
    """Return an exception in one line with file and line of the last step outside of libraries."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    installed = str(Path(os.__file__).parent)  # the standard library, and site-packages below it
    own = [frame for frame in frames if not frame.filename.startswith(installed)]
    text = one_line(error)
    if not frames:
        return text
    frame = (own or frames)[-1]
    return f"{text} ({frame.filename}, line {frame.lineno})"
