"""InceptionV3 as FID uses it, up to its 2048 pooled features.

Szegedy et al. 2015, arXiv 1512.00567; Heusel et al. 2017. The layers and their names are those of
the weights file `pt_inception-2015-12-05-6726825d.pth`, which the pytorch-fid project ported from
TensorFlow's graph of 2015-12-05. That graph differs from the InceptionV3 of today's libraries in
two ways: average pools divide by the pixels that are there, not by the padding as well, and the
pool of the very last block takes the maximum.
"""

# Axes: B batch, C channels, H W pixels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMENSIONS = 2048


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int],
                 stride: int = 1, padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)  # TensorFlow's; torch's own is 1e-5

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(image)))


def _average(image: Tensor) -> Tensor:
    # padding is not counted, see above
    return F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(image: Tensor) -> Tensor:
    return F.max_pool2d(image, 3, stride=1, padding=1)


def _wide(inputs: int, outputs: int) -> Conv:
    # 1 x 7, then 7 x 1: a factorized 7 x 7 (Szegedy et al. 2015, section 3.2)
    return Conv(inputs, outputs, (1, 7), padding=(0, 3))


def _tall(inputs: int, outputs: int) -> Conv:
    return Conv(inputs, outputs, (7, 1), padding=(3, 0))


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, double 3x3 and pool branches."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.branch1x1(image)
        five = self.branch5x5_2(self.branch5x5_1(image))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(image)))
        pool = self.branch_pool(_average(image))
        return torch.cat([one, five, double, pool], dim=1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        single = self.branch3x3(image)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(image)))
        pool = F.max_pool2d(image, 3, stride=2)
        return torch.cat([single, double, pool], dim=1)


class BlockC(nn.Module):
    """17 x 17: 7x7 convolutions as 1x7 and 7x1, `width` channels between them."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, width, 1)
        self.branch7x7_2 = _wide(width, width)
        self.branch7x7_3 = _tall(width, 192)
        self.branch7x7dbl_1 = Conv(inputs, width, 1)
        self.branch7x7dbl_2 = _tall(width, width)
        self.branch7x7dbl_3 = _wide(width, width)
        self.branch7x7dbl_4 = _tall(width, width)
        self.branch7x7dbl_5 = _wide(width, 192)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.branch1x1(image)
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(image)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(image)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pool = self.branch_pool(_average(image))
        return torch.cat([one, single, double, pool], dim=1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _wide(192, 192)
        self.branch7x7x3_3 = _tall(192, 192)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(image))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(image))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        pool = F.max_pool2d(image, 3, stride=2)
        return torch.cat([three, seven, pool], dim=1)


class BlockE(nn.Module):
    """8 x 8: 3x3 convolutions that end in 1x3 beside 3x1; average or maximum pool."""

    def __init__(self, inputs: int, maximum: bool) -> None:
        super().__init__()
        self.pool = _maximum if maximum else _average
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, image: Tensor) -> Tensor:
        single = self.branch3x3_1(image)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(image))
        one = self.branch1x1(image)
        pool = self.branch_pool(self.pool(image))
        return torch.cat([one, self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), pool], dim=1)


class InceptionV3(nn.Module):
    """Image [B, 3, 299, 299] in [-1, 1] -> features [B, 2048], without a classifier.

    Features are means over the last 8 x 8 positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, maximum=False)
        self.Mixed_7c = BlockE(2048, maximum=True)  # as in TensorFlow's graph, see above

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(image)))
        hidden = F.max_pool2d(hidden, 3, stride=2)  # [B, 64, 73, 73]
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = F.max_pool2d(hidden, 3, stride=2)  # [B, 192, 35, 35]
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))  # [B, 288, 35, 35]
        hidden = self.Mixed_6a(hidden)  # [B, 768, 17, 17]
        hidden = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(hidden))))
        hidden = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(hidden)))  # [B, 2048, 8, 8]
        return hidden.mean(dim=(2, 3))
