"""Fingerprint of an image tokenizer: equal fingerprints mean equal codes."""

from __future__ import annotations

import hashlib
import json

from tokenizer_image.image_tokenizer import ImageTokenizer


def code_fingerprint(tokenizer: ImageTokenizer) -> str:
    """Return 16 hex digits over the encoder, the codebook and all settings that decide a code.

    A fine-tuned decoder and moving averages leave it as it is, so tokens stay valid. Models and
    token shards on disk carry it: what is hashed, and in which order, must not change.
    """
    settings = json.dumps(tokenizer.code_settings(), sort_keys=True)
    digest = hashlib.blake2b(settings.encode(), digest_size=8)

    # of the quantizer only code_tensors() decide codes; its moving averages do not
    prefixes = tuple(f"{name}." for name in tokenizer.code_parts if name != "quantizer")
    tensors = dict(tokenizer.code_tensors())
    for name, tensor in tokenizer.state_dict().items():
        if name.startswith(prefixes):
            tensors.setdefault(name, tensor)

    for name in sorted(tensors):
        values = tensors[name].detach().float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
