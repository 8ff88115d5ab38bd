"""Augmentation and normalisation of images.

All randomness comes from one CPU generator, so the order and the transforms for a seed are the same on every device.
Normalised pixels can differ between devices in the last bit.
"""

import math

import torch
from torch import Generator, Tensor


def _coordinates(images: Tensor) -> tuple[Tensor, Tensor]:
    """x, int32 [W], and y, int32 [H, 1], of the pixels of images [N, C, H, W]."""
    y, x = (torch.arange(size, dtype=torch.int32, device=images.device) for size in images.shape[2:])
    return x, y.unsqueeze(1)


def _picked(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The pixels of images [N, C, H, W] at x and y, which broadcast to [N, H, W]; 0 outside the image."""
    n, channels, height, width = images.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = torch.where(inside, y * width + x, 0).long().view(n, 1, -1)
    picked = images.flatten(2).gather(2, index.expand(n, channels, -1)).view(images.shape)
    return picked * inside.unsqueeze(1)


class RandomAffine:
    """torchvision's RandomAffine (nearest, fill 0) for a batch of uint8 images, each with its own parameters.

    Like Pillow for a PIL image, it evaluates the inverse map in 16.16 fixed point.

    Args:
        degrees: the angle is uniform in [-degrees, degrees].
        translate: the largest shifts as fractions of width and height; shifts are whole pixels.
        scale: the range of the scale factor.
    """

    def __init__(self, degrees: float, translate: tuple[float, float], scale: tuple[float, float]):
        self.degrees, self.translate, self.scale = degrees, translate, scale

    def draw(self, images: Tensor, generator: Generator) -> Tensor:
        """Draws a transform for each image of [N, C, H, W]; returns int32 [N, 6], for :meth:`apply`."""
        n, _, height, width = images.shape
        uniform = torch.rand(4, n, generator=generator, dtype=torch.float64, device="cpu")
        angle = (2 * uniform[0] - 1) * self.degrees
        shift_x = ((2 * uniform[1] - 1) * (self.translate[0] * width)).round()
        shift_y = ((2 * uniform[2] - 1) * (self.translate[1] * height)).round()
        scale = self.scale[0] + uniform[3] * (self.scale[1] - self.scale[0])
        return self.inverse(angle, shift_x, shift_y, scale, height, width)

    @staticmethod
    def inverse(angle: Tensor, shift_x: Tensor, shift_y: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
        """The inverse maps, from output to input pixels, in 16.16 fixed point.

        The input pixel of the output pixel x, y is (a x + b y + c, d x + e y + f) / 65536, rounded down.

        Args:
            angle: degrees, clockwise, float64 [N]; the rotation is about the centre and before the shift.
            shift_x: pixels to the right, float64 [N].
            shift_y: pixels down, float64 [N].
            scale: scale factors, float64 [N].
            height, width: the size of the images.

        Returns:
            a, b, c, d, e, f of each image, int32 [N, 6].
        """
        radians = angle * (math.pi / 180)
        cos, sin = radians.cos() / scale, radians.sin() / scale
        centre_x, centre_y = width * 0.5, height * 0.5
        offset_x = cos * (-centre_x - shift_x) + sin * (-centre_y - shift_y) + centre_x
        offset_y = -sin * (-centre_x - shift_x) + cos * (-centre_y - shift_y) + centre_y
        # the centre of a pixel is at + 0.5
        start_x = offset_x + cos * 0.5 + sin * 0.5
        start_y = offset_y - sin * 0.5 + cos * 0.5
        matrices = torch.stack([cos, sin, start_x, -sin, cos, start_y], dim=1)
        return (matrices * 65536 + 0.5).floor().to(torch.int32)

    def matrices(self, drawn: Tensor, width: int) -> Tensor:
        """What :meth:`draw` has drawn, as inverse maps: that is what it draws."""
        return drawn

    @staticmethod
    def apply(images: Tensor, matrices: Tensor) -> Tensor:
        """Transforms images, uint8 [N, C, H, W], by matrices, int32 [N, 6]."""
        x, y = _coordinates(images)
        a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)  # [N, 1, 1]
        return _picked(images, (a * x + (b * y + c)) >> 16, (d * x + (e * y + f)) >> 16)


class RandomCropFlip:
    """torchvision's RandomCrop (padding with 0) and RandomHorizontalFlip for a batch of uint8 images."""

    def __init__(self, padding: int):
        self.padding = padding

    def draw(self, images: Tensor, generator: Generator) -> Tensor:
        """Draws a transform for each image: top and left in the padded image, and flip; int32 [N, 3]."""
        n = len(images)
        corner = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator, device="cpu")
        flip = torch.randint(0, 2, (n, 1), generator=generator, device="cpu")
        return torch.cat([corner, flip], dim=1).to(torch.int32)

    def matrices(self, drawn: Tensor, width: int) -> Tensor:
        """What :meth:`draw` has drawn for images of a width, as inverse maps (see :meth:`RandomAffine.inverse`)."""
        top, left, flip = drawn.unbind(1)
        zero, one = torch.zeros_like(flip), torch.ones_like(flip)
        first = left - self.padding + flip * (width - 1)
        return torch.stack([one - 2 * flip, zero, first, zero, one, top - self.padding], dim=1) * 65536

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Transforms images, uint8 [N, C, H, W], by parameters, int32 [N, 3]."""
        x, y = _coordinates(images)
        top, left, flip = parameters[:, :, None, None].unbind(1)  # [N, 1, 1]
        flipped = torch.where(flip.bool(), images.shape[3] - 1 - x, x)
        return _picked(images, flipped + left - self.padding, y + top - self.padding)


class Normalisation:
    """Maps uint8 pixels to (pixel / 255 - mean) / std, per channel, as ToTensor and Normalize do."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def table(self) -> Tensor:
        """The normalised value of each pixel value, float32 [256 C]: 256 values for each channel."""
        return self(torch.arange(256, device=self.mean.device).repeat(len(self.mean), 1, 1)).flatten()

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)
