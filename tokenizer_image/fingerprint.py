"""Which codes a tokenizer speaks: a hash of everything that decides them."""

from __future__ import annotations

import hashlib
import json

import torch

from tokenloom_common.pretrained import PretrainedModule

CODE_PARTS = ("encoder.", "quant_conv.", "quantizer.")


def code_fingerprint(tokenizer: PretrainedModule) -> str:
    """16 hex digits over config, encoder and codebook. A fine-tuned decoder leaves it as it is, so its tokens stay valid."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(tokenizer.config.plain(), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name.startswith(CODE_PARTS):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
