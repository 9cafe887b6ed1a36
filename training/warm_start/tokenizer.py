"""Begin a tokenizer's training with the weights of a trained one."""

from __future__ import annotations

import logging

from tokenizer_image import ImageTokenizer, load_tokenizer
from tokenloom_common.errors import UserError
from training.config.start_folders import find_tokenizer, refuse_own_run

log = logging.getLogger(__name__)


def take_tokenizer(tokenizer: ImageTokenizer, folder: str, decoder_only: bool, run_dir: str) -> None:
    """Copy weights of a trained tokenizer into one that is to be trained, in `run_dir`.

    decoder_only: what decides codes must fit exactly; the rest is taken over if all of it fits, and starts fresh in a
    larger decoder. Otherwise everything must fit. UserError naming the folder and up to five tensors that do not.
    """
    found = find_tokenizer(folder)
    refuse_own_run(folder, found, run_dir)
    trained = load_tokenizer(found)
    trained.config.check_encodes(f"init_from {folder}")
    ours, theirs = tokenizer.state_dict(), trained.state_dict()
    codes = tuple(f"{name}." for name in tokenizer.code_parts)
    differing = sorted(name for name in ours.keys() | theirs.keys()
                       if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape)
    in_the_way = [name for name in differing if not decoder_only or name.startswith(codes)]
    if type(trained) is not type(tokenizer) or in_the_way:
        what = f"kind {trained.kind} there, {tokenizer.kind} here" if type(trained) is not type(tokenizer) else (
            f"{len(in_the_way)} tensors differ: {', '.join(in_the_way[:5])}")
        raise UserError(f"init_from {folder}: its weights do not fit the model of this run ({what}); "
                        "leave model.* out, so that it is taken from there")
    settings = (trained.code_settings(), tokenizer.code_settings())
    if settings[0] != settings[1]:
        raise UserError(f"init_from {folder}: its codes are made with other settings ({settings[0]} there, "
                        f"{settings[1]} here); leave model.* out, so that they are taken from there")
    kept = [name for name in theirs if name.startswith(codes)] if differing else list(theirs)
    tokenizer.load_state_dict({**ours, **{name: theirs[name] for name in kept}})
    if differing:
        log.info("init_from %s: codes taken over; the decoder has another size and starts fresh", folder)
