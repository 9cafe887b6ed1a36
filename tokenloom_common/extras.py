"""Optional dependencies: import one, or name the extra that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from tokenloom_common.errors import UserError, one_line


def require_extra(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import and return an optional module. UserError with the pip command if that fails.

    purpose: the part of Tokenloom that needs it, in the singular ("a token shard").
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # with the error's text: an installed package whose own import fails ends here too
        package = (error.name or module).replace("_", "-")
        raise UserError(f"{purpose} needs {package} ({one_line(error)}): pip install "
                        f"'tokenloom[{extra}]'") from None
