"""Start an image tokenizer from the weights of a trained one."""

from __future__ import annotations

import logging

from torch import Tensor

from tokenizer_image import ImageTokenizer, load_tokenizer
from tokenloom_common.errors import UserError
from training.config.start_folders import find_tokenizer, refuse_own_run

log = logging.getLogger(__name__)


def take_tokenizer(tokenizer: ImageTokenizer, folder: str, decoder_only: bool,
                   run_dir: str) -> None:
    """Copy weights of a trained tokenizer into one that is to be trained in `run_dir`.

    decoder_only: the parts that decide codes must fit exactly; the others are copied if all of them
    fit, and start fresh in a larger decoder. Otherwise everything must fit. UserError naming the
    folder and up to five tensors that do not.
    """
    trained_folder = find_tokenizer(folder)
    refuse_own_run(folder, trained_folder, run_dir)
    trained = load_tokenizer(trained_folder)
    # a detokenizer alone, as some projects publish it, has no encoder to start from
    trained.config.check_encodes(f"init_from {folder}")

    own_state, trained_state = tokenizer.state_dict(), trained.state_dict()
    misfits = differing = _differing(own_state, trained_state)
    code_parts = tuple(f"{name}." for name in tokenizer.code_parts)
    if decoder_only:  # Parti enlarges the decoder alone, after the codes are fixed
        misfits = [name for name in differing if name.startswith(code_parts)]
    _check_fits(tokenizer, trained, folder, misfits)

    copied = trained_state
    if differing:  # in the decoder alone, which is another one then
        copied = {name: tensor for name, tensor in trained_state.items()
                  if name.startswith(code_parts)}
        log.info("init_from %s: codes taken over; the decoder has another size and starts fresh",
                 folder)
    tokenizer.load_state_dict(own_state | copied)


def _differing(own: dict[str, Tensor], trained: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are missing on one side or have another shape."""

    def differs(name: str) -> bool:
        return name not in own or name not in trained or own[name].shape != trained[name].shape

    return sorted(name for name in own.keys() | trained.keys() if differs(name))


def _check_fits(tokenizer: ImageTokenizer, trained: ImageTokenizer, folder: str,
                misfits: list[str]) -> None:
    problem = None
    # the kind first: it explains all tensors that differ
    if type(trained) is not type(tokenizer):
        problem = f"kind {trained.kind} there, {tokenizer.kind} here"
    elif misfits:
        problem = f"{len(misfits)} tensors differ: {', '.join(misfits[:5])}"
    if problem:
        raise UserError(f"init_from {folder}: its weights do not fit the model of this run "
                        f"({problem}); leave model.* out, so that it is taken from there")

    # settings without weights that decide codes all the same
    there, here = trained.code_settings(), tokenizer.code_settings()
    if there != here:
        raise UserError(f"init_from {folder}: its codes are made with other settings ({there} "
                        f"there, {here} here); leave model.* out, so that they are taken from "
                        "there")
