"""How much of what tells images apart an image tokenizer keeps."""

# Axes: B batch, H W pixels

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FLAT_VARIANCE = 0.01**2
"""Of pixels in [-1, 1]: about one level of 8 bits. Images that differ less are all the same."""
STRUCTURE_SHARE = 0.1
"""Share of the variance from which on what is inside the images counts without their mean colour.
Less may be the noise of plain images."""


class ImageSpread:
    """Sums over images and their reconstructions, for `kept`. They stay on the device."""

    def __init__(self, height: int, width: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        # sums over images, of the originals and of the reconstructions
        self.pixels = torch.zeros(2, 3, height, width, dtype=torch.float64, device=device)
        # original x original and original x reconstruction: of pixels, of the images' mean colours
        self.products = torch.zeros(2, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, image: Tensor, reconstruction: Tensor) -> None:
        """Add images in [-1, 1] and their reconstructions [B, 3, H, W], which are clamped."""
        image = image.float()
        reconstruction = reconstruction.float().clamp(-1, 1)  # as it is shown
        self.count += len(image)
        self.pixels += torch.stack([image.sum(dim=0), reconstruction.sum(dim=0)])

        colour, colour_again = image.mean(dim=(2, 3)), reconstruction.mean(dim=(2, 3))  # [B, 3]
        products = [_mean_product(image, image), _mean_product(image, reconstruction),
                    _mean_product(colour, colour), _mean_product(colour, colour_again)]
        self.products += torch.stack(products).view(2, 2)

    def kept(self, total: Callable[[Tensor], Tensor] = lambda x: x) -> float | None:
        """Return the share of the differences between images that reconstructions keep.

        The covariance of an image with its reconstruction over the variance of images, summed over
        pixels: 1 if all come back, 0 if all reconstructions are one image or have nothing to do
        with theirs. The mean colour of an image is left out where images have more than that.
        None if images do not differ, or after a reconstruction that is not finite.

        total: sums a tensor over the processes of a run.
        """
        count = total(self.count)
        if count < 2:
            return None
        means = total(self.pixels) / count  # [2, 3, H, W]
        colours = means.mean(dim=(2, 3))  # [2, 3]
        pixel_products, colour_products = total(self.products) / count

        # both as (variance, covariance), by E[xy] - E[x] E[y]: float64 leaves room for it
        whole = pixel_products - (means[0] * means).mean(dim=(1, 2, 3))
        structure = whole - (colour_products - (colours[0] * colours).mean(dim=1))
        variance, covariance = whole.tolist()
        if not variance > FLAT_VARIANCE:
            return None
        if float(structure[0]) > STRUCTURE_SHARE * variance:
            variance, covariance = structure.tolist()
        return covariance / variance if math.isfinite(covariance) else None

    def clear(self) -> None:
        """Begin anew."""
        for tensor in self.state().values():
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {"count": self.count, "pixels": self.pixels, "products": self.products}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _mean_product(values: Tensor, others: Tensor) -> Tensor:
    """Mean over all but the batch of values x others, summed over the batch, in float64."""
    product = values * others
    return product.sum(dtype=torch.float64) / product[0].numel()
