"""GPU facts: peak FLOP/s and memory by name."""

from __future__ import annotations

import re

PEAK_FLOPS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12},
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12},
    "H200 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 417e12},
    "H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 378e12},
    "H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 417e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 183e12},
    "L4": {"bfloat16": 121e12, "float16": 121e12, "float32": 60e12},
    "RTX 4090": {"bfloat16": 165e12, "float16": 165e12, "float32": 82.6e12},
    "V100": {"float16": 125e12, "float32": 15.7e12},
    "V100 PCIe": {"float16": 112e12, "float32": 14e12},
}
"""GPU -> precision -> dense FLOP/s, half of what data sheets say "with sparsity".

From NVIDIA's data sheet of each product; HGX B200's for B200, the Ada architecture's white paper
for RTX 4090 (with float32 sums). float32 is TF32, which training allows, and float32 itself on
V100, which has neither TF32 nor bfloat16.
"""

GPU_MEMORY = {"B200": 180, "H200": 141, "H200 NVL": 141, "H100": 80, "H100 PCIe": 80,
              "H100 NVL": 94, "A100": 80, "L40S": 48, "L4": 24, "RTX 4090": 24, "V100": 32,
              "V100 PCIe": 32}
"""GPU -> GB (10^9 bytes) as sold, the larger where there are two; --memory says otherwise."""

OTHER_CHIPS = {"nvl", "mig", "laptop", "d", "ti", "max"}
"""Words that name another, slower device: only an entry with that word stands for it.

d: NVIDIA's "RTX 4090 D"; mig: a slice of a GPU; max: laptops' "Max-Q".
"""


def known_gpu(name: str) -> str | None:
    """The entry of PEAK_FLOPS for a device's name, None if there is none.

    All words of an entry must be in the name; of several, the one with the most words is meant.
    """
    words = _words(name)
    entries = []
    for entry in PEAK_FLOPS:
        entry_words = _words(entry)
        # {"h100"} stands for "NVIDIA H100 80GB HBM3", but not for "NVIDIA H100 NVL"
        if entry_words <= words and OTHER_CHIPS & words <= entry_words:
            entries.append(entry)
    return max(entries, key=lambda entry: len(_words(entry)), default=None)


def peak_flops(name: str, precision: str) -> float | None:
    """Dense FLOP/s of a GPU, named as by torch.cuda.get_device_name(); None if unknown."""
    entry = known_gpu(name)
    return PEAK_FLOPS[entry].get(precision) if entry else None


def _words(name: str) -> set[str]:
    # whole words, or "L4" would be found in "L40S"
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def training_flops(forward: int) -> int:
    """FLOPs of forward and backward: the two gradients of a product each take as much as itself.

    Activations that are computed again (gradient checkpointing) do not count: model FLOPs
    utilisation is about the FLOPs that the model needs, not those a run spends (Chowdhery et al.
    2022, appendix B).
    """
    return 3 * forward
