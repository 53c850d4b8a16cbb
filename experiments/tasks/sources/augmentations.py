"""What training makes of an image, by name: each a function of the image and a generator of random
numbers, which alone it draws from.

Images are uint8, [H, W] or [H, W, 3]; Pillow, by whose operations the published recipes are
defined, does the geometry and the colours."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Random = np.random.Generator
GREY = 128  # of what a turned or moved image leaves empty
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The whole image, bicubic."""
    if image.shape[:2] == (rows, columns):
        return image
    return np.asarray(Image.fromarray(image).resize((columns, rows), BICUBIC))


def centre_crop(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The middle, seven eighths of what fits, resized: what evaluation sees of photographs."""
    high, wide = image.shape[:2]
    share = 0.875 * min(high / rows, wide / columns)
    box_high, box_wide = share * rows, share * columns
    top, left = (high - box_high) / 2, (wide - box_wide) / 2
    return _of_box(image, (left, top, left + box_wide, top + box_high), rows, columns)


def padded_crop(image: np.ndarray, random: Random, padding: int) -> np.ndarray:
    """The image moved by up to `padding` pixels in each direction, zeros where it was not."""
    rows, columns = image.shape[:2]
    top, left = random.integers(0, 2 * padding + 1, 2)
    wide = [(padding, padding)] * 2 + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, wide)[top : top + rows, left : left + columns]


def resized_crop(image: np.ndarray, random: Random, rows: int, columns: int) -> np.ndarray:
    """A random part, 8 to 100 % of the area and 3:4 to 4:3 in shape, resized to rows x columns
    (Szegedy et al., CVPR 2015, arXiv 1409.4842, section 6)."""
    high, wide = image.shape[:2]
    for _ in range(10):
        area = random.uniform(0.08, 1.0) * high * wide
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_wide, box_high = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if box_wide <= wide and box_high <= high:
            left, top = random.uniform(0, wide - box_wide), random.uniform(0, high - box_high)
            return _of_box(image, (left, top, left + box_wide, top + box_high), rows, columns)
    return centre_crop(image, rows, columns)


def flipped(image: np.ndarray, random: Random) -> np.ndarray:
    """Its mirror image in half of all cases."""
    return image[:, ::-1] if random.random() < 0.5 else image


def _of_box(
    image: np.ndarray, box: tuple[float, float, float, float], rows: int, columns: int
) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((columns, rows), BICUBIC, box=box))


def rand_augment(
    image: np.ndarray, random: Random, operations: int, magnitude: float, deviation: float
) -> np.ndarray:
    """`operations` of OPERATIONS in a row, each left out in half of all cases, of a magnitude out
    of 10 that is drawn from N(magnitude, deviation^2).

    RandAugment (Cubuk et al., 2020, arXiv 1909.13719) as recipes write "rand-m9-mstd0.5-inc1": more
    magnitude is more change in every operation. Turns are bilinear."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    for name in random.choice(list(OPERATIONS), operations):
        skipped, sign = random.random() < 0.5, random.choice((-1.0, 1.0))
        level = float(np.clip(random.normal(magnitude, deviation), 0, 10)) / 10
        if not skipped:
            picture = OPERATIONS[str(name)](picture, level, sign)
    return np.asarray(picture)


def _moved(picture: Image.Image, *matrix: float) -> Image.Image:
    """The picture whose (x, y) is (a x + b y + c, d x + e y + f) of this one."""
    fill = GREY if picture.mode == "L" else (GREY,) * 3
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=BILINEAR, fillcolor=fill
    )


def _rotated(picture: Image.Image, level: float, sign: float) -> Image.Image:
    fill = GREY if picture.mode == "L" else (GREY,) * 3
    return picture.rotate(30 * level * sign, resample=BILINEAR, fillcolor=fill)


def _solarize_added(picture: Image.Image, level: float, sign: float) -> Image.Image:
    added = int(110 * level)
    return picture.point(
        [min(255, i + added) if i < 128 else i for i in range(256)] * _bands(picture)
    )


def _bands(picture: Image.Image) -> int:
    return len(picture.getbands())


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> "Operation":
    return lambda picture, level, sign: kind(picture).enhance(1 + 0.9 * level * sign)


Operation = Callable[[Image.Image, float, float], Image.Image]
# Level 0 to 1 and a sign, -1 or 1, of what has two directions.
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda picture, level, sign: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level, sign: ImageOps.equalize(picture),
    "invert": lambda picture, level, sign: ImageOps.invert(picture),
    "rotate": _rotated,
    "posterize": lambda picture, level, sign: ImageOps.posterize(
        picture, max(1, 4 - int(4 * level))
    ),
    "solarize": lambda picture, level, sign: ImageOps.solarize(picture, 256 - int(256 * level)),
    "solarize_add": _solarize_added,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda picture, level, sign: _moved(picture, 1, 0.3 * level * sign, 0, 0, 1, 0),
    "shear_y": lambda picture, level, sign: _moved(picture, 1, 0, 0, 0.3 * level * sign, 1, 0),
    "translate_x": lambda picture, level, sign: _moved(
        picture, 1, 0, 0.45 * level * sign * picture.width, 0, 1, 0
    ),
    "translate_y": lambda picture, level, sign: _moved(
        picture, 1, 0, 0, 0, 1, 0.45 * level * sign * picture.height
    ),
}


def erased(image: np.ndarray, random: Random, probability: float) -> np.ndarray:
    """A rectangle of 2 to 33 % of the area, 3:10 to 10:3 in shape, made N(0, 1) in every number,
    with this probability; of a float image of about zero mean and unit variance (random erasing:
    Zhong et al., AAAI 2020, arXiv 1708.04896)."""
    if random.random() >= probability:
        return image
    rows, columns = image.shape[:2]
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * rows * columns
        ratio = np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3)))
        high, wide = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < high < rows and 0 < wide < columns:
            top, left = random.integers(0, rows - high + 1), random.integers(0, columns - wide + 1)
            image = image.copy()
            image[top : top + high, left : left + wide] = random.standard_normal(
                (high, wide, *image.shape[2:]), np.float32
            )
            return image
    return image


def mixed(
    image: np.ndarray, other: np.ndarray, random: Random, mixup: float, cutmix: float
) -> tuple[np.ndarray, float]:
    """An image mixed with another one, and its own share in the mixture.

    share ~ Beta(mixup, mixup), and the pixels are share image + (1 - share) other (mixup: Zhang et
    al., ICLR 2018, arXiv 1710.09412); or ~ Beta(cutmix, cutmix), and a rectangle of the other with
    1 - share of the area replaces what is there, cut off at the borders, after which the share is
    what is left (CutMix: Yun et al., ICCV 2019, arXiv 1905.04899). Where both are above 0 each is
    done to half of the images."""
    cut = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = random.beta(alpha, alpha)
    if not cut:
        return (share * image + (1 - share) * other).astype(image.dtype), float(share)
    rows, columns = image.shape[:2]
    side = np.sqrt(1 - share)
    middle = random.integers(0, (rows, columns))
    half = np.array((int(rows * side), int(columns * side))) // 2
    (top, left), (bottom, right) = (
        np.clip(middle - half, 0, (rows, columns)),
        np.clip(middle + half, 0, (rows, columns)),
    )
    image = image.copy()
    image[top:bottom, left:right] = other[top:bottom, left:right]
    return image, float(1 - (bottom - top) * (right - left) / (rows * columns))
