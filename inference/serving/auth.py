"""The API key: where it is read from, how it is compared, and which hosts may be asked for.

Access is decided by the route that has matched, never by the text of a path, and a route without
`public=True` needs the key (`inference/serving/routes.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from starlette.requests import Request

from inference.serving.errors import ApiError
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.text_files import read_text_file

KEY_VARIABLE = "TOKENLOOM_API_KEY"
LEAST_CHARACTERS = 16
MAX_KEY_BYTES = 4096
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ApiKey:
    """A key that is kept as its hash, so that no log or traceback can show it."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)

    def check(self, request: Request) -> None:
        """Raise ApiError 401 unless the request carries the key as `Authorization: Bearer`."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # hashes have equal lengths: the time tells neither the length nor a first differing byte
        same = hmac.compare_digest(_digest(given.strip()), self._digest)
        if scheme.lower() != "bearer" or not same:
            wrong = "a wrong API key" if given else "no API key"
            raise ApiError(401, f"{wrong}; send it as the header 'Authorization: Bearer KEY'",
                           headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key(file: str | None) -> ApiKey | None:
    """Read the key of --api-key-file, or of the environment; None where neither is given.

    UserError for both at once, and for a key that is short or no plain text.
    """
    variable = os.environ.get(KEY_VARIABLE)
    if file is not None and variable is not None:
        raise UserError(f"--api-key-file {file} and the variable {KEY_VARIABLE} both give a key; "
                        "leave one of them out")
    if file is not None:
        return ApiKey(_checked(_read_file(Path(file)), f"--api-key-file {file}"))
    if variable is not None:
        return ApiKey(_checked(variable.strip(), KEY_VARIABLE))
    return None


def _read_file(path: Path) -> str:
    where = f"--api-key-file {path}"
    if not path.is_file():
        raise MissingFileError(f"{where}: no such file")
    if path.stat().st_size > MAX_KEY_BYTES:
        raise UserError(f"{where}: too large for a key; it holds one line")
    return read_text_file(path, where).strip()


def _checked(key: str, where: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where}: a key is one line of ASCII without spaces; make one with: "
                        "openssl rand -hex 32")
    if len(key) < LEAST_CHARACTERS:
        raise UserError(f"{where}: the key has {len(key)} characters, at least {LEAST_CHARACTERS} "
                        "are needed; make one with: openssl rand -hex 32")
    return key


# ---- hosts


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name may resolve to any address
        return False


def check_key_needed(host: str, key: ApiKey | None) -> None:
    """Raise UserError for an address that others can reach, without a key."""
    if key is None and not is_loopback(host):
        raise UserError(f"--host {host} can be reached from other machines, so a key is needed: "
                        f"--api-key-file FILE, or the variable {KEY_VARIABLE}")


def check_host(request: Request, bound_to: str) -> None:
    """Raise ApiError 403 unless a server on loopback is asked by a name of loopback.

    A web page whose domain points to 127.0.0.1 (DNS rebinding) has its own name in `Host`.
    """
    host = request.headers.get("host", "").lower()
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    if name not in (*LOOPBACK_NAMES, bound_to.lower(), f"[{bound_to.lower()}]"):
        raise ApiError(403, "this server answers to localhost alone, not to the host that the "
                       "request names; a proxy in front of it sends 'Host: 127.0.0.1'",
                       code="host_not_allowed")
