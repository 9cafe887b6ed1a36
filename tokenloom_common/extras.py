"""Optional dependencies: import them or name the extra that installs them."""

from __future__ import annotations

import importlib.util

from tokenloom_common.errors import UserError


def require_extra(module: str) -> None:
    """UserError that names the extra if a package of it is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"needs {module.replace('_', '-')}: pip install tokenloom[train]")
