"""Image processors: from images to `pixel_values`, as `preprocessor_config.json` says.

Every type is the same pipeline (convert to RGB, resize, crop, rescale, normalise, pad) under defaults of its own, and
takes the settings that its reference takes; `TYPES` is the table. Values are those of the reference on Pillow.
The types that end in "Fast", which the reference runs on torchvision, are computed as those without the ending, as the
reference does where torchvision is missing: with it, resized values are rounded otherwise, and an odd border around a
small image is split the other way. What they can do beyond the others (crop, pad), they do.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from formax.processors.files import (
    PREPROCESSOR,
    BatchFeature,
    as_batch,
    folder_of,
    save,
    settings_of,
    split_options,
    type_of,
    unknown,
)
from formax.vision import segmentation, steps
from formax.vision.detection import post_process_object_detection

_HALVES = (0.5, 0.5, 0.5)
_COMMON: dict[str, Any] = {
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALVES,
    "image_std": _HALVES,
}
_RGB: dict[str, Any] = {"do_convert_rgb": None}
_CROP: dict[str, Any] = {"do_center_crop": False, "crop_size": None}
_PAD: dict[str, Any] = {"do_pad": False, "pad_size": None}
_CLIP: dict[str, Any] = _COMMON | {
    "do_convert_rgb": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}

# The settings that a type takes, with its defaults; a setting that is not here does nothing in that type.
_SLOW: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _COMMON | _RGB | {"size": {"height": 224, "width": 224}},
    "ConvNextImageProcessor": _COMMON | {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "BeitImageProcessor": _COMMON
    | {
        "size": {"height": 256, "width": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_reduce_labels": False,
    },
    "DetrImageProcessor": _COMMON
    | {
        "size": {"shortest_edge": 800, "longest_edge": 1333},
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
        "do_pad": True,
        "pad_size": None,
    },
}
TYPES: dict[str, dict[str, Any]] = _SLOW | {f"{name}Fast": _RGB | _CROP | _PAD | row for name, row in _SLOW.items()}

# For files that name no type.
_MODEL_TYPES = {
    "ViTImageProcessor": "clipseg dinat ijepa mgp-str nat swiftformer swin swinv2 vit vit_mae vit_msn",
    "ConvNextImageProcessor": "convnext convnextv2 cvt regnet resnet van",
    "CLIPImageProcessor": "aimv2 aimv2_vision_model clip clip_vision_model git groupvit kosmos-2 metaclip_2 mlcd"
    " vipllava xclip",
    "BitImageProcessor": "bit dinov2 focalnet hiera",
    "BeitImageProcessor": "beit data2vec-vision",
    "DetrImageProcessor": "detr table-transformer",
}
TYPE_OF_MODEL_TYPE = {model_type: name for name, types in _MODEL_TYPES.items() for model_type in types.split()}


def canonical(name: str) -> str:
    """The name of today for the name of a type: ViTFeatureExtractor was what ViTImageProcessor is."""
    return name.removesuffix("FeatureExtractor") + "ImageProcessor" if name.endswith("FeatureExtractor") else name


def _historic(name: str) -> tuple[str, ...]:
    """Settings that a type had under other names."""
    return ("max_size", "pad_and_return_pixel_mask") if "Detr" in name else ("reduce_labels",) if "Beit" in name else ()


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """The settings of a pipeline, and a call that runs it.

    `from_pretrained` and `of_type` make one; settings have the names that they have in preprocessor_config.json, and
    any can be given for one call: `processor(images, do_rescale=False)`.

    Attributes:
        image_processor_type: a key of `TYPES`.
        size: what images are resized to: height and width; shortest_edge, with or without longest_edge; longest_edge;
            or max_height and max_width. All but the first keep the proportions.
        resample: Pillow's filter; 2 is bilinear, 3 bicubic.
        crop_size: height and width of the crop in the middle.
        crop_pct: the part of a resized image's edge that is cropped out (ConvNext, below 384 pixels).
        pad_size: height and width that images are padded to; the largest of the batch by default.
        do_reduce_labels: in segmentation maps 0 is no class (and becomes 255), and classes count from 1 (BEiT).
        other: what else the file said; kept for `save_pretrained`.
    """

    image_processor_type: str
    do_convert_rgb: bool | None = None
    do_resize: bool = True
    size: Mapping[str, int]
    resample: int = 2
    crop_pct: float | None = None
    do_center_crop: bool = False
    crop_size: Mapping[str, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | tuple[float, ...] = _HALVES
    image_std: float | tuple[float, ...] = _HALVES
    do_pad: bool = False
    pad_size: Mapping[str, int] | None = None
    do_reduce_labels: bool = False
    other: Mapping[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------ reading, writing

    @classmethod
    def of_type(cls, image_processor_type: str, **settings: Any) -> ImageProcessor:
        """The image processor of a type with its defaults, but for these settings.

        Raises:
            UnknownProcessorError: there is no such type.
            ValueError: a setting that there is not, or a value that it cannot have.
        """
        made = cls.from_config({"image_processor_type": image_processor_type}, f"ImageProcessor {image_processor_type}")
        return made.replace(**settings)

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str | Path = PREPROCESSOR) -> ImageProcessor:
        """The image processor that the content of a preprocessor_config.json describes, historic spellings included.

        Args:
            values: the content; it names its type. Null stands for the type's default.
            where: the file, for messages.

        Raises:
            UnknownProcessorError: no type, or one that there is not.
            ValueError: a value that a setting cannot have.
        """
        named = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
        name = canonical(named)
        if name not in TYPES:
            raise unknown(named, where, TYPES, "image processor")
        given = {key: value for key, value in values.items() if value is not None}
        historic = {key: given.pop(key) for key in _historic(name) if key in given}
        longest = historic.get("max_size", 1333) if "Detr" in name else None
        if "pad_and_return_pixel_mask" in historic:
            given["do_pad"] = historic["pad_and_return_pixel_mask"]
        if "reduce_labels" in historic:
            given.setdefault("do_reduce_labels", historic["reduce_labels"])
        defaults = TYPES[name]
        settings = defaults | {key: value for key, value in given.items() if key in defaults}
        dropped = ("image_processor_type", "feature_extractor_type", *defaults)
        try:
            size = steps.size_dict(settings.pop("size"), square="ViT" in name or "Beit" in name, longest=longest)
            for key in ("crop_size", "pad_size"):
                if settings.get(key) is not None:
                    settings[key] = steps.size_dict(settings[key], square=True, name=key)
            for key in ("image_mean", "image_std"):
                if isinstance(settings[key], Sequence) and not isinstance(settings[key], str):
                    settings[key] = tuple(settings[key])
            other = {key: value for key, value in given.items() if key not in dropped}
            made = cls(image_processor_type=name, size=size, other=other, **settings)
            made._check()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return made

    def _check(self) -> None:
        """Raises ValueError for settings that cannot be."""
        switches = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb")
        for key in (*switches, "do_reduce_labels"):
            if not isinstance(getattr(self, key), bool | None):
                raise ValueError(f"{key}={getattr(self, key)!r}: use true or false")
        if type(self.resample) is not int or self.resample not in steps.RESAMPLING:
            known = ", ".join(f"{number} ({name})" for number, name in steps.RESAMPLING.items())
            raise ValueError(f"resample={self.resample!r}: use {known}")
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(map(steps.is_number, numbers)):
                raise ValueError(f"{key}={value!r}: use a number, or one for each channel")
            if key == "image_std" and self.do_normalize and 0 in numbers:
                raise ValueError(f"{key}={value!r}: images are divided by it, so it cannot be 0")
        for key in ("rescale_factor", "crop_pct"):
            value = getattr(self, key)
            if value is not None and not (steps.is_number(value) and value > 0):
                raise ValueError(f"{key}={value!r}: use a positive number")
        if self.do_center_crop and self.crop_size is None:
            raise ValueError("do_center_crop needs a crop_size")
        for key in ("crop_size", "pad_size"):
            value = getattr(self, key)
            if value is not None and set(value) != {"height", "width"}:
                raise ValueError(f"{key}={value!r}: use height and width")
        if self.do_resize and self.crop_pct is not None and set(self.size) != {"shortest_edge"}:
            raise ValueError(f"size={self.size!r}: {self.image_processor_type} takes a shortest_edge")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> ImageProcessor:
        """Reads the image processor of a checkpoint folder or hub repository.

        Args:
            path_or_repo: as in `formax.from_pretrained`.
            **options: `revision`, `cache_dir`, `local_files_only` and `token` as there; settings to be replaced.

        Raises:
            FileNotFoundError: no such folder, or it has no preprocessor_config.json.
            UnknownProcessorError: a type that formax does not have; the message names those there are.
            ValueError: a file that cannot be understood, or a setting that cannot be.
        """
        where, settings = split_options(options)
        return cls.from_folder(folder_of(path_or_repo, **where), **settings)

    @classmethod
    def from_folder(cls, folder: Path, **settings: Any) -> ImageProcessor:
        """Reads the image processor of a local folder, with settings replaced."""
        values, where = settings_of(folder, "image_processor")
        named = type_of(values, folder, TYPE_OF_MODEL_TYPE)
        made = cls.from_config({**values, "image_processor_type": named}, where)
        return made.replace(**settings) if settings else made

    def replace(self, **settings: Any) -> ImageProcessor:
        """The same with other settings; they may be spelled as in a file (`size=224`), None changes nothing.

        Raises:
            ValueError: a setting that this type does not take, or a value that it cannot have.
        """
        known = [*TYPES[self.image_processor_type]]
        historic = _historic(self.image_processor_type)
        for key in settings:
            if key not in (*known, *historic, *self.other):
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
                raise ValueError(f"{self.image_processor_type} takes no {key!r}{hint}")
        if settings.get("max_size") is not None and not isinstance(settings.get("size"), int):
            raise ValueError("max_size goes with a number as size; otherwise give size a longest_edge")
        given = {key: value for key, value in settings.items() if value is not None}
        return self.from_config(self.to_dict() | given, self.image_processor_type)

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json."""
        values = {key: getattr(self, key) for key in TYPES[self.image_processor_type]}
        plain = {
            key: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }
        return {**self.other, **plain, "image_processor_type": self.image_processor_type}

    def save_pretrained(self, save_directory: str | Path) -> str:
        """Writes preprocessor_config.json, which transformers opens too, and returns its path."""
        return save(save_directory, PREPROCESSOR, self.to_dict())

    # --------------------------------------------------------------------------------------------------------- running

    @property
    def model_input_names(self) -> tuple[str, ...]:
        """What a call returns."""
        return ("pixel_values", "pixel_mask") if self.do_pad else ("pixel_values",)

    @property
    def pipeline(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        """The steps, each [H, W, C] -> [H', W', C], between the reading of an image and the padding of a batch."""
        found: list[Callable[[np.ndarray], np.ndarray]] = []
        if self.do_resize and self.crop_pct is not None:
            # From 384 pixels on ConvNeXt is shown the whole image, below that the middle of a larger one.
            edge = self.size["shortest_edge"]
            square = {"height": edge, "width": edge}
            larger = {"shortest_edge": int(edge / self.crop_pct)} if edge < 384 else square
            found.append(partial(steps.resize, size=larger, resample=self.resample))
            if edge < 384:
                found.append(partial(steps.center_crop, size=square))
        elif self.do_resize:
            found.append(partial(steps.resize, size=self.size, resample=self.resample))
        if self.do_center_crop and self.crop_size is not None:
            found.append(partial(steps.center_crop, size=self.crop_size))
        if self.do_rescale:
            found.append(partial(steps.rescale, factor=self.rescale_factor))
        if self.do_normalize:
            found.append(partial(steps.normalize, mean=self.image_mean, std=self.image_std))
        return found

    def __call__(
        self,
        images: Any,
        segmentation_maps: Any = None,
        *,
        return_tensors: str | None = None,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Makes `pixel_values` [B, C, H, W] (and `pixel_mask`, `labels` [B, H, W]) of images.

        Args:
            images: an image or a list of them: of Pillow (made RGB where the model wants three channels), arrays
                [H, W, C] or [C, H, W] of grey levels or of floats, paths of files; or an array with a batch axis.
                Values between 0 and 1 want `do_rescale=False`.
            segmentation_maps: for each image the class of every pixel, 0 to 255: of Pillow ("L", "P") or an array
                [H, W]. They are resized and cropped as their images are, but by the nearest pixel: classes have no
                mean. (The reference resizes them as it does images.)
            return_tensors: "np", "jax", or None: NumPy, where images that end with different sizes stay a list.
            data_format: "channels_first" or "channels_last", of what is returned.
            input_data_format: the same of arrays given, where their shape does not tell.
            **settings: settings for this call.

        Raises:
            ValueError: no image, something else than an image, or one that the settings do not fit.
        """
        if settings:
            changed = self.replace(**settings)
            return changed(
                images,
                segmentation_maps,
                return_tensors=return_tensors,
                data_format=data_format,
                input_data_format=input_data_format,
            )
        if data_format not in steps.FORMATS:
            raise ValueError(f"data_format={data_format!r}: use {' or '.join(map(repr, steps.FORMATS))}")
        channels = 1 if isinstance(self.image_mean, tuple) and len(self.image_mean) == 1 else 3
        arrays = []
        for index, image in enumerate(steps.as_list(images)):
            try:
                arrays.append(self._one(steps.as_array(image, channels=channels, data_format=input_data_format)))
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from None
        data: dict[str, list[np.ndarray]] = {}
        if self.do_pad:
            largest = {
                "height": max(array.shape[0] for array in arrays),
                "width": max(array.shape[1] for array in arrays),
            }
            padded = [steps.pad(array, **(self.pad_size or largest)) for array in arrays]
            arrays, data["pixel_mask"] = [array for array, _ in padded], [mask for _, mask in padded]
        if segmentation_maps is not None:
            data["labels"] = self._labels(segmentation_maps, len(arrays))
        if data_format == "channels_first":
            arrays = [array.transpose(2, 0, 1) for array in arrays]
        hint = "pass a fixed size (height and width), a crop, or padding where the type has it"
        return as_batch({"pixel_values": arrays, **data}, return_tensors, hint)

    def _labels(self, maps: Any, images: int) -> list[np.ndarray]:
        """Segmentation maps [H', W'], int64, as large as the images are made."""
        if self.do_pad:
            raise ValueError(f"{self.image_processor_type} pads its images: it takes no segmentation_maps")
        each = list(maps) if isinstance(maps, list | tuple) or np.ndim(maps) == 3 else [maps]
        if len(each) != images:
            raise ValueError(f"{len(each)} segmentation_maps for {images} images")
        place = dataclasses.replace(self, do_rescale=False, do_normalize=False, resample=0).pipeline
        found = []
        for index, one in enumerate(each):
            array = np.asarray(one)
            if array.ndim != 2 or array.dtype.kind not in "iub":
                raise ValueError(
                    f"segmentation map {index}: use a class for every pixel, [H, W], whole numbers; this is of shape "
                    f"{array.shape}, {array.dtype}"
                )
            if self.do_reduce_labels:
                array = np.where(array == 0, 255, np.where(array == 255, 255, array.astype(np.int64) - 1))
            array = array[..., None]
            for step in place:
                array = step(array)
            found.append(array[..., 0].astype(np.int64))
        return found

    def _one(self, image: np.ndarray) -> np.ndarray:
        """[H, W, C] -> [H', W', C]."""
        if self.do_rescale and image.dtype != np.uint8 and image.min() >= 0 and 0 < image.max() <= 1:
            warnings.warn(
                "pixel values from 0 to 1 are multiplied by rescale_factor once more: pass do_rescale=False, unless"
                " that is meant",
                stacklevel=4,
            )
        for step in self.pipeline:
            image = step(image)
        return image.astype(np.float32) if np.issubdtype(image.dtype, np.floating) else image

    # What the outputs of models that find objects and segments mean.
    post_process_object_detection = staticmethod(post_process_object_detection)
    post_process_semantic_segmentation = staticmethod(segmentation.post_process_semantic_segmentation)
    post_process_instance_segmentation = staticmethod(segmentation.post_process_instance_segmentation)
    post_process_panoptic_segmentation = staticmethod(segmentation.post_process_panoptic_segmentation)
