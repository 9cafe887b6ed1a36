"""Fetch a model folder from the Hugging Face Hub by id and revision, and upload one.

Built from huggingface_hub's documented pieces (snapshot_download, create_repo, create_commit). Its
ready-made mixin loads with strict=False and ignores a missing or misspelt config, and its
upload_folder may spread a model over several commits, between which the repository holds half of
the old model and half of the new one; here an upload is one commit.

huggingface_hub itself honours HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tokenloom_common.errors import MissingFileError, RunFailedError, UserError, one_line

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.md", "merges.txt", "*/merges.txt")
"""Patterns of the files to fetch: nothing that can be executed, no pickle."""
OWN_FILES = ("*.safetensors", "*.safetensors.index.json", "*.model")
"""Patterns of the files that a push deletes from a repository if the new model has no such file: an
index of old shards would win over the new weights."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDER_HINT = "give the folder that training wrote as RUN/model"


def is_hub_id(name: str | Path) -> bool:
    """Whether `owner/name` is the id of a hub repository and not an existing folder."""
    return not Path(name).exists() and _HUB_ID.fullmatch(str(name)) is not None


def resolve_folder(name: str | Path, revision: str | None = None,
                   patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """Return a local folder as it is, or the local snapshot of a hub id `owner/name`.

    revision: a branch, tag or commit of the hub id (default: main). With HF_HUB_OFFLINE=1, or
    without a connection, the snapshot comes from the local cache. MissingFileError if there is no
    such model or revision, or it cannot be fetched; UserError for a local folder's revision.
    """
    if not str(name):
        raise UserError("the model's folder is an empty name")
    path = Path(name)
    if path.is_dir():  # a folder wins over a hub id of the same form
        if revision is not None:
            raise UserError(f"{path}: a local folder has no revision '{revision}'; leave the "
                            "revision out, or give a hub id")
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; give the model's folder")
    if not _HUB_ID.fullmatch(str(name)):
        raise MissingFileError(f"{name}: no such model folder; {_FOLDER_HINT}, or a hub id")

    # imported here, as below: a local folder is loaded without the time that this takes
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))
    except (_http_error(), HFValidationError, OSError) as error:
        raise MissingFileError(_why_not_fetched(str(name), revision, error)) from None


def _http_error() -> type[Exception]:
    """The base of all errors of huggingface_hub's HTTP client: httpx in 1.x, httpx2 later."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _why_not_fetched(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return (f"{name}: the hub model has no revision '{revision}'; give a branch, a tag or a "
                "whole commit hash")
    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
        return (f"{name}: the hub model asks to accept its terms first; do so on its page, and log "
                "in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return (f"{name}: no such folder, and no hub model of that name (a private one needs "
                f"HF_TOKEN or `hf auth login`); {_FOLDER_HINT}, or the hub id")

    missing = f"{name}: no such folder, and no hub model of that name"
    if revision:
        missing += f" at revision '{revision}'"
    if constants.HF_HUB_OFFLINE:
        return (f"{missing} is whole in the local cache while HF_HUB_OFFLINE is set; fetch it once "
                f"with a connection, or {_FOLDER_HINT}")
    if isinstance(error, LocalEntryNotFoundError):
        return (f"{missing} can be fetched: the hub cannot be reached and the local cache has "
                f"none; {_FOLDER_HINT}, or try again with a connection")
    return f"{missing} can be fetched ({type(error).__name__}); {_FOLDER_HINT}"


class Pushable:
    """Base of objects with a `save_pretrained(folder)`, which can be uploaded as that folder."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all."""
        raise NotImplementedError

    def check_savable(self) -> None:
        """UserError if save_pretrained would refuse; called before the hub is contacted."""

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None,
                    branch: str | None = None, commit_message: str | None = None,
                    create_pr: bool = False) -> str:
        """Upload the saved folder as one commit to `owner/name` -> URL of the commit (or PR).

        The repository is created if there is none. private: for a repository that is created;
        UserError if there is a public one. branch: created if there is none (default: main).
        create_pr: propose the commit instead of making it. token: default HF_TOKEN, or the one that
        `hf auth login` keeps. UserError for an id or token that the hub refuses, and while
        HF_HUB_OFFLINE is set; RunFailedError if the hub cannot be reached. Files of an older model
        that this one does not have (shards, an index) are deleted in the same commit.
        """
        self.check_savable()
        _check_push(repo_id, token, branch, create_pr)
        message = commit_message or "Upload a Tokenloom model"
        with tempfile.TemporaryDirectory(prefix="tokenloom-push-") as folder, _hub_errors(repo_id):
            # before gigabytes are written: the hub may refuse
            _make_repo(repo_id, private, token, branch)
            saved = self.save_pretrained(Path(folder) / "model")
            return _commit(saved, repo_id, token, branch, message, create_pr)


def _check_push(repo_id: str, token: str | None, branch: str | None, create_pr: bool) -> None:
    """UserError for all that can be known to fail before anything is written or sent."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    if not _HUB_ID.fullmatch(repo_id):  # the hub's own check also takes a name without an owner
        raise UserError(f"'{repo_id}': not a hub id; give owner/name")
    with _hub_errors(repo_id):
        validate_repo_id(repo_id)  # further rules of the hub: length, no "--" or ".."
    if create_pr and branch is not None:
        raise UserError(f"{repo_id}: a pull request has a branch of its own; leave create_pr or "
                        f"branch '{branch}' out")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: cannot push while HF_HUB_OFFLINE is set; unset it")
    if token is None and get_token() is None:
        raise UserError(f"{repo_id}: no token of the hub; run `hf auth login`, set HF_TOKEN, or "
                        "pass token")


def _make_repo(repo_id: str, private: bool, token: str | None, branch: str | None) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    # an existing repository keeps its visibility, without an error
    if private and not api.repo_info(repo_id).private:
        raise UserError(f"{repo_id}: is there already and is public; make it private in its "
                        "settings, or leave private out")
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)


def _commit(folder: Path, repo_id: str, token: str | None, branch: str | None, message: str,
            create_pr: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi(token=token)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    in_repo = api.list_repo_files(repo_id, revision=branch)
    replaceable = filter_repo_objects(in_repo, allow_patterns=list(OWN_FILES))

    # one commit: no reader of the repository meets new weights beside an old index
    operations: list[Any] = [CommitOperationDelete(name) for name in replaceable
                             if name not in files]
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    done = api.create_commit(repo_id, operations, commit_message=message, revision=branch,
                             create_pr=create_pr)
    return str(done.pr_url if create_pr else done.commit_url)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the hub and of the connection into one line each; ours pass unchanged."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (UserError, RunFailedError):
        raise
    except HFValidationError as error:
        raise UserError(f"'{repo_id}': not a hub id ({one_line(error)[:120]})") from None
    except HfHubHTTPError as error:
        _raise_refusal(repo_id, error.response.status_code, str(error.server_message or ""))
    except _http_error() as error:
        raise RunFailedError(f"{repo_id}: the hub cannot be reached ({one_line(error)[:120]}); try "
                             "again with a connection") from None


def _raise_refusal(repo_id: str, status: int, server_message: str) -> NoReturn:
    reason = " ".join(server_message.split())[:200]  # may be a page of HTML
    answer = f"{status}: {reason}" if reason else f"{status}"
    if status in (401, 403):
        raise UserError(f"{repo_id}: the hub refuses the token ({answer}); use "
                        "one that may write there") from None
    # bad request, not found, conflict, unprocessable: trying again would give the same
    if status in (400, 404, 409, 422):
        raise UserError(f"{repo_id}: the hub refuses this ({answer})") from None
    raise RunFailedError(f"{repo_id}: the hub failed ({answer}); try again later") from None
