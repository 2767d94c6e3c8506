"""Heads of the tasks: what a task has of its own behind the backbone."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def grid_of(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, p) → (B, p, h, w): the last h * w tokens, those of the patches; class and register tokens come before."""
    height, width = grid
    return tokens[:, tokens.shape[1] - height * width :].mT.unflatten(2, grid)


class ConvHead(nn.Module):
    """The paper's decoder: one 3×3 Conv-BN-ReLU on the grid of patch tokens, and a 1×1 convolution to the channels.

    Args:
        num_features: p, width of the tokens.
        channels: C, outputs per pixel.
        grid: (h, w) patches.
        patch: pixels along a patch's side.
    """

    def __init__(self, num_features: int, channels: int, grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.mix = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False), nn.BatchNorm2d(num_features), nn.ReLU()
        )
        self.project = nn.Conv2d(num_features, self.outputs(channels), 1)

    def outputs(self, channels: int) -> int:
        """Per patch."""
        return channels

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, p) → (B, C, h * patch, w * patch)."""
        return self.to_pixels(self.project(self.mix(grid_of(tokens, self.grid))))

    def to_pixels(self, patches: Tensor) -> Tensor:
        return F.interpolate(patches, scale_factor=self.patch, mode="bilinear", align_corners=False)


class PixelHead(ConvHead):
    """Likewise, but a patch puts out all of its pixels: finer on small images, with patch² times the last weights."""

    def outputs(self, channels: int) -> int:
        return channels * self.patch**2

    def to_pixels(self, patches: Tensor) -> Tensor:
        return F.pixel_shuffle(patches, self.patch)


class TapsHead(nn.Module):
    """1×1 convolutions of the tokens behind four blocks (``models.taps_of``), summed; arguments as ``ConvHead``'s."""

    def __init__(self, num_features: int, channels: int, grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.project = nn.ModuleList(nn.Conv2d(num_features, channels, 1, bias=tap == 0) for tap in range(4))

    def forward(self, taps: tuple[Tensor, ...]) -> Tensor:
        """Four times (B, N, p) → (B, C, h * patch, w * patch)."""
        patches = sum(project(grid_of(tap, self.grid)) for project, tap in zip(self.project, taps, strict=True))
        return F.interpolate(patches, scale_factor=self.patch, mode="bilinear", align_corners=False)


class TokenHead(nn.Module):
    """Of a task that is not dense: from the first token, (B, N, p), to (B, channels)."""

    def __init__(self, num_features: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.project = nn.Linear(num_features, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.norm(tokens[:, 0]))


DECODERS: dict[str, Callable[[int, int, tuple[int, int], int], nn.Module]] = {
    "conv": ConvHead,
    "pixels": PixelHead,
    "taps": TapsHead,
}
