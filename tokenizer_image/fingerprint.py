"""Which codes a tokenizer speaks: a hash of everything that decides them."""

from __future__ import annotations

import hashlib
import json

from tokenizer_image.vqgan import VQGAN

CODE_PARTS = ("encoder.", "quant_conv.")
CODE_FIELDS = ("resolution", "attention_resolutions", "norm_groups")  # shapes say the rest


def code_fingerprint(tokenizer: VQGAN) -> str:
    """16 hex digits over encoder, codebook and what else decides a code.

    A fine-tuned decoder, moving averages and fields that a later release adds leave it as it is, so tokens stay valid.
    """
    config = tokenizer.config
    decides = {name: getattr(config, name) for name in CODE_FIELDS} | {"l2_normalize": config.quantizer.l2_normalize}
    digest = hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8)
    parts = {name: tensor for name, tensor in tokenizer.state_dict().items() if name.startswith(CODE_PARTS)}
    for name, tensor in sorted({**parts, "codebook": tokenizer.quantizer.codebook}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
