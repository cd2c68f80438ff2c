"""The steps that make model inputs of images: pure functions on arrays [H, W, C].

Their order and settings are the business of `formax.vision.image_processor`. Resampling is Pillow's, as in training:
values follow its rounding to whole grey levels. Anything else is NumPy.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("channels_first", "channels_last")
# An image made larger than this is a mistake in the settings: its batch takes gigabytes.
MAX_PIXELS = 2**26
# Pillow's filters by their numbers, which the configuration files hold.
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
)


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ImportError('images need Pillow: pip install "formax[vision]"') from None
    return PIL


def is_pil(image: Any) -> TypeGuard[Image]:
    """Whether it is an image of Pillow, without importing Pillow for the answer."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


# ------------------------------------------------------------------------------------------------------------- reading


def as_list(images: Any) -> list[Any]:
    """A list of single images, of one image, a list of them, or an array [B, ...].

    Raises:
        ValueError: no image at all, or an array of another rank.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError("no image was given: the list is empty")
        return list(images)
    if is_pil(images) or isinstance(images, str | Path):
        return [images]
    rank = np.ndim(images) if hasattr(images, "__array__") else None
    if rank == 4:
        if not len(images):
            raise ValueError(f"no image was given: the array is of shape {np.shape(images)}")
        return list(images)
    return [images]


def as_array(image: Any, *, channels: int, data_format: str | None = None) -> np.ndarray:
    """An image as an array [H, W, C].

    Args:
        image: of Pillow, an array [H, W, C] or [C, H, W], or the path of a file.
        channels: how many the model takes; images of Pillow are converted to that many (1 or 3).
        data_format: which axis of an array is the channels'; told by its size (1 or 3, the first axis before the
            last) by default.

    Raises:
        ValueError: it is no image, or one of another rank.
        FileNotFoundError: no such file.
    """
    if isinstance(image, str | Path):
        image = _open(image)
    if is_pil(image):
        if min(image.size) == 0:
            raise ValueError(f"an image of {image.size[0]} x {image.size[1]} pixels holds nothing")
        mode = "L" if channels == 1 else "RGB"
        array = np.array(image if image.mode == mode else image.convert(mode))
        return array[..., None] if channels == 1 else array
    if not hasattr(image, "__array__"):
        raise ValueError(
            f"an image is a PIL image, an array [H, W, C] or [C, H, W], or a path; this is a {type(image).__name__}"
        )
    array = np.asarray(image)
    if array.ndim != 3:
        raise ValueError(
            f"an array of shape {array.shape} is no image: use [H, W, C] or [C, H, W] (a batch has one axis more)"
        )
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"an image of dtype {array.dtype}: pixels are numbers")
    if array.size == 0:
        raise ValueError(f"an image of shape {array.shape} holds nothing")
    return array.transpose(1, 2, 0) if _format(array, data_format) == "channels_first" else array


def _open(path: str | Path) -> Image:
    """An image file, turned upright as its EXIF data say, in RGB."""
    pil = pillow()
    # What Pillow's readers raise of damaged files, and of those whose header asks for more than memory should give.
    broken = (OSError, ValueError, SyntaxError, EOFError, struct.error, pil.Image.DecompressionBombError)
    try:
        with pil.Image.open(path) as image:
            return pil.ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r}: there is no such image file (text goes to a tokenizer)") from None
    except broken as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from None


def _format(array: np.ndarray, said: str | None) -> str:
    """Which axis of [., ., .] holds the channels."""
    if said is not None:
        if said not in FORMATS:
            raise ValueError(f"input_data_format={said!r}: use {' or '.join(map(repr, FORMATS))}")
        return said
    if array.shape[0] in (1, 3):
        return "channels_first"
    if array.shape[2] in (1, 3):
        return "channels_last"
    raise ValueError(
        f"an array of shape {array.shape} has 1 or 3 channels neither first nor last; give input_data_format="
        + (" or drop the transparency: image[..., :3]" if 4 in (array.shape[0], array.shape[2]) else "")
    )


# --------------------------------------------------------------------------------------------------------------- steps


def size_dict(size: Any, *, square: bool, longest: int | None = None, name: str = "size") -> dict[str, int]:
    """A size in words, of any of the spellings that configuration files hold.

    Args:
        size: in words already, a number, or [height, width].
        square: whether a number is both edges, and not the shortest one.
        longest: what the longest edge may be, where a number is the shortest one.
        name: the setting, for messages.

    Raises:
        ValueError: it is none of these, or more than `MAX_PIXELS`.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if square:
            size = {"height": size, "width": size}
        else:
            size = {"shortest_edge": size} | ({} if longest is None else {"longest_edge": longest})
    elif isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, Mapping):
        # Newer files hold every word there is, most of them null.
        words = {key: value for key, value in size.items() if value is not None}
        if set(words) in SIZES and all(_is_length(value) for value in words.values()):
            if math.prod(words.get(key, 1) for key in ("height", "width")) > MAX_PIXELS:
                raise ValueError(f"{name}={size!r}: images of more than {MAX_PIXELS} pixels are not made")
            return {key: int(value) for key, value in words.items()}
    known = "; ".join(" and ".join(sorted(keys)) for keys in SIZES)
    raise ValueError(f"{name}={size!r}: use a number of pixels, [height, width], or a dictionary of {known}")


def is_number(value: Any) -> bool:
    """Whether it is a number, and no NaN or infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_length(value: Any) -> bool:
    return is_number(value) and value == int(value) and value > 0


def target_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """The (height, width) that an image of that height and width is resized to."""
    if "height" in size:
        return size["height"], size["width"]
    if "shortest_edge" not in size:
        limit = size.get("longest_edge", 0)
        scale = min((size.get("max_height") or limit) / height, (size.get("max_width") or limit) / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    short, exact = size["shortest_edge"], float(size["shortest_edge"])
    low, high = min(height, width), max(height, width)
    longest = size.get("longest_edge")
    if longest is not None and high / low * short > longest:
        # The shortest edge is rounded, but the longest follows from it as it was before.
        exact = longest * float(low) / high
        short = max(1, round(exact))
    if low == short:
        return height, width
    other = int(exact * high / low)
    return (other, short) if width < height else (short, other)


def resize(image: np.ndarray, size: Mapping[str, int], resample: int) -> np.ndarray:
    """[H, W, C] -> [H', W', C], by Pillow, in whole grey levels; of floats between 0 and 1 it makes such floats again.

    Raises:
        ValueError: values that are no grey levels, 0 to 255, and no floats between 0 and 1; more than `MAX_PIXELS`.
    """
    pil = pillow()
    height, width = target_size(image.shape[0], image.shape[1], size)
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"size={dict(size)} makes {height} x {width} of an image of {image.shape[0]} x {image.shape[1]} (height x "
            f"width): images of more than {MAX_PIXELS} pixels are not made"
        )
    fractions = _are_fractions(image)
    if fractions:
        image = (image.astype(np.float64) * 255).astype(np.float32)
    levels = image.astype(np.uint8)
    single = levels.shape[-1] == 1
    picture = pil.Image.fromarray(np.ascontiguousarray(levels[..., 0] if single else levels))
    out = np.array(picture.resize((width, height), resample=resample))
    out = out[..., None] if single else out
    return rescale(out, 1 / 255) if fractions else out


def _are_fractions(image: np.ndarray) -> bool:
    """Whether values are floats between 0 and 1, and not the grey levels 0 to 255 (in whichever dtype)."""
    if image.dtype == np.uint8:
        return False
    low, high = image.min(), image.max()
    if low >= 0 and high <= 255:  # neither of which NaN is
        whole = np.allclose(image, image.astype(np.int64))
        if whole or high <= 1:
            return not whole
    raise ValueError(
        f"an image to be resized holds values from {low} to {high}: use grey levels, 0 to 255, or floats from 0 to 1"
    )


def center_crop(image: np.ndarray, size: Mapping[str, int]) -> np.ndarray:
    """[H, W, C] -> [height, width, C] around the middle, with zeros where the image is smaller."""
    for axis, wanted in enumerate((size["height"], size["width"])):
        spare = image.shape[axis] - wanted
        if spare >= 0:
            middle = slice(spare // 2, spare // 2 + wanted)
            image = image[middle] if axis == 0 else image[:, middle]
        else:
            before = math.ceil(-spare / 2)
            widths = [(0, 0)] * 3
            widths[axis] = (before, -spare - before)
            image = np.pad(image, widths)
    return image


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the values; float32."""
    return (image.astype(np.float64) * factor).astype(np.float32)


def normalize(image: np.ndarray, mean: float | Sequence[float], std: float | Sequence[float]) -> np.ndarray:
    """Subtracts the mean of each channel of [H, W, C] and divides by its deviation.

    Raises:
        ValueError: the image has another number of channels.
    """
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)
    for name, value in (("image_mean", mean), ("image_std", std)):
        if isinstance(value, Sequence) and len(value) != image.shape[-1]:
            raise ValueError(f"an image has {image.shape[-1]} channels, but {name} is {list(value)}")
    return (image - np.array(mean, image.dtype)) / np.array(std, image.dtype)


def pad(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[H, W, C] -> ([height, width, C] with zeros below and to the right, mask [height, width] of the image, int64).

    Raises:
        ValueError: the image is larger.
    """
    rows, columns = image.shape[:2]
    if rows > height or columns > width:
        raise ValueError(
            f"pad_size is {height} x {width} (height x width), smaller than an image of {rows} x {columns}"
        )
    mask = np.zeros((height, width), np.int64)
    mask[:rows, :columns] = 1
    return np.pad(image, ((0, height - rows), (0, width - columns), (0, 0))), mask
