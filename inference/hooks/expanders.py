"""Expanders by the name that --expand takes."""

from __future__ import annotations

from inference.hooks.expansion import FunctionExpander, PromptExpander
from inference.hooks.known_concepts import concepts_expander
from inference.hooks.user_code import load_function
from tokenloom_common.errors import UserError

KNOWN_CONCEPTS = "known-concepts"
"""Built-in expander: words that the model does not know become the nearest ones that it knows."""


def load_expander(spec: str, model: object = None) -> PromptExpander:
    """Return the expander that --expand names: KNOWN_CONCEPTS, or module:function.

    model: the TextToImage whose concepts.json KNOWN_CONCEPTS goes by; not needed for a function.
    UserError for an unknown name, a function that cannot be imported, a model without concepts.
    """
    if ":" in spec:
        return FunctionExpander(load_function(spec, "--expand", arguments=1))
    check_expander_name(spec)
    return concepts_expander(model)


def check_expander_name(spec: str) -> None:
    """Raise UserError for a --expand that cannot be, before a model is loaded for it."""
    if ":" in spec:
        load_expander(spec)
    elif spec != KNOWN_CONCEPTS:
        raise UserError(f"--expand {spec!r}: unknown; give {KNOWN_CONCEPTS}, or a function of your "
                        "own as module:function")
