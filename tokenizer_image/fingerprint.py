"""Which codes a tokenizer speaks: a hash of everything that decides them."""

from __future__ import annotations

import hashlib
import json

from tokenizer_image.image_tokenizer import ImageTokenizer


def code_fingerprint(tokenizer: ImageTokenizer) -> str:
    """16 hex digits over encoder, codebook and what else decides a code.

    A fine-tuned decoder, moving averages and fields that a later release adds leave it as it is, so tokens stay valid.
    """
    digest = hashlib.blake2b(json.dumps(tokenizer.code_settings(), sort_keys=True).encode(), digest_size=8)
    parts = tuple(f"{name}." for name in tokenizer.code_parts if name != "quantizer")
    tensors = {name: tensor for name, tensor in tokenizer.state_dict().items() if name.startswith(parts)}
    for name, tensor in sorted({**tensors, **tokenizer.code_tensors()}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
