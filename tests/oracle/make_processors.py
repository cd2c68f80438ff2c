"""Writes `tests/data/processors/*.npz`: what the reference's image processors and feature extractors make.

    python tests/oracle/make_processors.py [--check] [--any-version]

Run in the environment of `requirements.txt` (it has Pillow; torchvision is not there, so the processors are those that
work with Pillow). A case is the content of a checkpoint's preprocessor_config.json, made-up images or recordings, and
the options of a call. The files hold every output under `<case>.<name>`, and under `saved` the settings that the
reference writes when it saves what it opened. What is made up here and the cases are read by the suite as well; only
the reference's part needs the reference.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DATA = Path(__file__).resolve().parent.parent / "data" / "processors"
TOLERANCE = 1e-5

# -------------------------------------------------------------------------------------------------------------- made up


def levels(height: int, width: int, channels: int) -> np.ndarray:
    """Grey levels [H, W, C], uint8: a slope, waves of several lengths and a few hard edges, all in whole numbers."""
    y, x, c = np.ogrid[:height, :width, :channels]
    slope = (x * 200) // width + (y * 3 + x * y // 7) % 40
    waves = ((x * (5 + 2 * c) + y * 11) % 64) + ((x // 6 + y // 5 + c) % 3) * 37
    return ((slope + waves + 53 * c) % 256).astype(np.uint8)


def image(name: str) -> Any:
    """The made-up image of a name: "RGB 37x53" (of Pillow, height x width), "hwc 37x53", "chw", "floats", "whole"."""
    kind, _, size = name.partition(" ")
    height, width = map(int, size.split("x"))
    if kind in ("RGB", "RGBA", "L", "P"):
        from PIL import Image

        made = levels(height, width, {"RGBA": 4, "L": 1}.get(kind, 3))
        picture = Image.fromarray(made[..., 0] if kind == "L" else made)
        return picture.quantize(16) if kind == "P" else picture
    made = levels(height, width, 3)
    return {
        "hwc": made,
        "chw": made.transpose(2, 0, 1),
        "floats": (made / 255).astype(np.float32).transpose(2, 0, 1),
        "whole": made.astype(np.float64),
        "batch": np.stack([made, made[::-1]]),
    }[kind]


def classes(name: str) -> np.ndarray:
    """The made-up classes of the pixels of an image, uint8 [H, W]: patches of 0, 1, 2, 7 and 255."""
    height, width = map(int, name.split("x"))
    y, x = np.ogrid[:height, :width]
    return np.array([0, 1, 2, 7, 255], np.uint8)[(y // 5 + x // 7) % 5]


def recording(name: str) -> np.ndarray:
    """The made-up recording of a name: "8000 float32": sines that come and go, and noise, in so many samples."""
    count, _, dtype = name.partition(" ")
    n = np.arange(int(count))
    noise = (n * 7919 % 10007 * (n % 131 + 3) % 997) / 997 - 0.5
    wave = 0.4 * np.sin(n * 0.05) * (n % 4000 > 900) + 0.2 * np.sin(n * n * 1e-5) + 0.05 * noise + 0.03
    return (wave * 20000).astype(np.int16) if dtype == "int16" else wave.astype(dtype or "float32")


def detections() -> tuple[np.ndarray, np.ndarray]:
    """Logits [2, 7, 5] and boxes [2, 7, 4] of a detector."""
    n = np.arange(2 * 7 * 9, dtype=np.float64).reshape(2, 7, 9)
    return (3 * np.sin(n[..., :5] * 1.7)).astype(np.float32), (0.5 + 0.4 * np.cos(n[..., 5:])).astype(np.float32)


def segments() -> tuple[np.ndarray, np.ndarray]:
    """Logits [2, 7, 5] and masks [2, 7, 9, 13] of a segmenter: blobs, some of one class, two in one place."""
    middles = [(2, 2), (6, 10), (2, 10), (6.4, 2), (6.6, 2.4), (4.5, 6), (8, 6)]
    labels = [1, 2, 1, 0, 3, 2, 4]  # the last is no object
    y, x = np.ogrid[:9, :13]
    blobs = np.stack([4 - 0.9 * ((y - a) ** 2 + (x - b) ** 2) for a, b in middles])
    logits = np.full((7, 5), -1.0)
    logits[range(7), labels] = [3.0, 2.5, 3.5, 4.0, 3.1, 0.2, 5.0]  # the last but one is unsure
    nothing = np.tile(np.linspace(0, 0.1, 5), (7, 1))
    return np.stack([logits, nothing]).astype(np.float32), np.stack([blobs, blobs]).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- cases

_VIT = {"image_processor_type": "ViTImageProcessor"}
_CONVNEXT = {"image_processor_type": "ConvNextImageProcessor"}
PHOTOS = ["RGB 37x53", "RGB 61x29", "RGB 24x24"]

IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"config": _VIT | {"size": {"height": 18, "width": 22}}},
    "vit_fast": {
        "config": {
            "image_processor_type": "ViTImageProcessorFast",
            "size": {"height": 18, "width": 22},
            "crop_size": None,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "data_format": "channels_first",
            "device": None,
        },
        "images": ["RGBA 37x53", "L 31x33", "P 40x20", "RGB 18x22"],
    },
    # What google/vit-base-patch16-224 and its like looked like at first: a number, and no type at all.
    "vit_historic": {
        "config": {
            "do_normalize": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "size": 21,
        },
        "model_type": "vit",
    },
    "vit_extractor": {
        "config": {
            "feature_extractor_type": "ViTFeatureExtractor",
            "size": [17, 23],
            "resample": 3,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.25],
        },
        "images": ["chw 37x53", "chw 61x29"],
    },
    "vit_floats": {
        "config": {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 19, "width": 16},
            "do_rescale": False,
        },
        "images": ["floats 37x53", "floats 20x31"],
    },
    "vit_whole": {
        "config": _VIT | {"size": {"height": 19, "width": 16}, "resample": 0},
        "images": ["whole 37x53"],
    },
    "vit_batch": {
        "config": _VIT | {"size": {"height": 19, "width": 16}, "resample": 1},
        "images": "batch 33x27",
        "call": {"data_format": "channels_last"},
    },
    "vit_plain": {
        "config": {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": False,
            "image_mean": 0.3,
            "image_std": 0.7,
        },
        "images": ["hwc 20x31"],
    },
    "vit_call": {
        "config": _VIT | {"size": {"height": 18, "width": 22}},
        "call": {"size": {"height": 15, "width": 12}, "do_normalize": False, "rescale_factor": 1 / 127.5},
    },
    "resnet": {"config": _CONVNEXT | {"size": {"shortest_edge": 24}, "resample": 3}},
    "resnet_historic": {
        "config": {
            "crop_pct": 0.7,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ConvNextFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": 17,
        },
    },
    # The brink: from 384 pixels on nothing is cropped.
    "resnet_large": {
        "config": _CONVNEXT | {"size": {"shortest_edge": 384}},
        "images": ["RGB 37x53"],
        "kept": 37,
    },
    "clip": {
        "config": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 23},
            "crop_size": {"height": 22, "width": 17},
        },
        "images": ["RGB 37x53", "RGBA 61x29", "L 40x41"],
    },
    "clip_historic": {
        "config": {
            "crop_size": 20,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 20,
        },
    },
    # Crops that are larger than the image are filled up with zeros, before the values are normalised.
    "clip_outside": {
        "config": {
            "image_processor_type": "CLIPImageProcessorFast",
            "size": {"shortest_edge": 13},
            "crop_size": {"height": 18, "width": 24},
        },
    },
    "clip_square": {
        "config": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": 20, "width": 26},
            "do_center_crop": False,
            "do_rescale": False,
            "resample": 5,
        },
    },
    "dinov2": {
        "config": {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 25},
            "crop_size": {"height": 22, "width": 17},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
        },
        "images": ["RGB 37x53", "RGBA 61x29"],
    },
    "dinov2_untyped": {"config": {"size": {"shortest_edge": 23}, "crop_size": 20}, "model_type": "dinov2"},
    "beit": {"config": {"image_processor_type": "BeitImageProcessor", "size": 25, "crop_size": 22}},
    "beit_historic": {
        "config": {
            "crop_size": 20,
            "do_center_crop": False,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "BeitFeatureExtractor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "size": 21,
        },
        "model_type": "beit",
    },
    # The reference resizes classes as it does pixels, which only the nearest one leaves whole.
    "beit_maps": {
        "config": {
            "image_processor_type": "BeitImageProcessor",
            "size": {"height": 25, "width": 23},
            "crop_size": {"height": 27, "width": 20},
            "resample": 0,
            "do_reduce_labels": True,
        },
        "maps": ["37x53", "61x29", "24x24"],
    },
    "detr": {
        "config": {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 20, "longest_edge": 33}},
        "images": [*PHOTOS, "RGB 20x25", "RGB 21x90"],
    },
    "detr_historic": {
        "config": {
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "DetrFeatureExtractor",
            "format": "coco_detection",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "max_size": 31,
            "size": 19,
        },
    },
    "detr_fast": {
        "config": {
            "image_processor_type": "DetrImageProcessorFast",
            "size": {"shortest_edge": 800, "longest_edge": 1333},
            "pad_size": {"height": 40, "width": 45},
            "do_pad": True,
        },
        "call": {"size": {"max_height": 30, "max_width": 40}},
    },
    "detr_unpadded": {
        "config": {
            "image_processor_type": "DetrImageProcessor",
            "size": {"height": 16, "width": 19},
            "pad_and_return_pixel_mask": False,
        },
    },
}

_WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor"}
_WAV2VEC2 = {
    "do_normalize": True,
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "sampling_rate": 16000,
}
_TWO = ["8000", "11113 float64"]

RECORDINGS: dict[str, dict[str, Any]] = {
    "whisper": {"config": _WHISPER | {"chunk_length": 1}, "recordings": ["9000", "23001"]},
    # 30 seconds, of which every 97th frame is kept.
    "whisper_30": {
        "config": {"chunk_length": 30, "feature_size": 80, "hop_length": 160, "n_fft": 400, "n_samples": 480000},
        "model_type": "whisper",
        "recordings": ["47111"],
        "kept": 97,
    },
    # The mask is asked for by the call: where only the file asks, the reference forgets to bring it to frames.
    "whisper_128": {
        "config": _WHISPER | {"chunk_length": 1, "feature_size": 128},
        "recordings": ["9000", "12345 float64"],
        "call": {"return_attention_mask": True},
    },
    "whisper_8k": {
        "config": _WHISPER
        | {"chunk_length": 2, "feature_size": 40, "sampling_rate": 16000, "n_fft": 256, "hop_length": 100},
        "recordings": _TWO,
        "call": {"padding": "longest", "return_attention_mask": True, "pad_to_multiple_of": 128, "do_normalize": True},
        "kept": 2,
    },
    "wav2vec2": {
        "config": _WAV2VEC2 | {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": True},
        "recordings": _TWO,
        "call": {"padding": True},
        "kept": 13,
    },
    # The ones that were trained without a mask: the padding counts in mean and variance.
    "wav2vec2_maskless": {
        "config": _WAV2VEC2 | {"return_attention_mask": False},
        "model_type": "wav2vec2",
        "recordings": _TWO,
        "call": {"padding": "longest", "pad_to_multiple_of": 1000},
        "kept": 13,
    },
    "wav2vec2_one": {"config": _WAV2VEC2, "model_type": "hubert", "recordings": "4001 int16", "kept": 3},
    "wav2vec2_cut": {
        "config": _WAV2VEC2 | {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "padding_value": 0.5},
        "recordings": ["3000", "6000"],
        "call": {
            "padding": "max_length",
            "max_length": 4999,
            "truncation": True,
            "return_attention_mask": True,
        },
        "kept": 13,
    },
    "wav2vec2_raw": {
        "config": _WAV2VEC2 | {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False},
        "recordings": ["3000 int16", "2500 int16"],
        "call": {"padding": True},
        "kept": 7,
    },
}


_SIZES = [(33, 29), (17, 40)]
SEGMENTED: dict[str, dict[str, Any]] = {
    "semantic": {},
    "semantic_resized": {"target_sizes": _SIZES},
    "instance": {"threshold": 0.7},
    "instance_resized": {"target_sizes": _SIZES, "overlap_mask_area_threshold": 0.1},
    # Fused last: the reference gives the segment after a fused one a number that may be taken.
    "panoptic": {"label_ids_to_fuse": {2}, "threshold": 0.4, "mask_threshold": 0.3},
    "panoptic_resized": {"label_ids_to_fuse": {0, 2}, "target_sizes": _SIZES, "mask_threshold": 0.3},
}


def made(names: str | list[str], make: Any) -> Any:
    """The made-up inputs of a case: one, or a list."""
    return make(names) if isinstance(names, str) else [make(name) for name in names]


def write_files(folder: Path, case: dict[str, Any]) -> None:
    """Writes the checkpoint's files that a case describes."""
    (folder / "preprocessor_config.json").write_text(json.dumps(case["config"]))
    if "model_type" in case:
        (folder / "config.json").write_text(json.dumps({"model_type": case["model_type"]}))


def call_of(case: dict[str, Any]) -> dict[str, Any]:
    """The options of a call."""
    maps = {"segmentation_maps": [classes(name) for name in case["maps"]]} if "maps" in case else {}
    return {**case.get("call", {}), **maps}


def kept(value: np.ndarray, case: dict[str, Any]) -> np.ndarray:
    """The part of an output that is in the file: every so many of the last axis."""
    return value[..., :: case.get("kept", 1)]


# -------------------------------------------------------------------------------------------------------- the reference


def answers(cases: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """What the reference makes of every case."""
    import transformers

    out: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), case)
            if "recordings" in case:
                opened = transformers.AutoFeatureExtractor.from_pretrained(folder)
                inputs = made(case["recordings"], recording)
            else:
                opened = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
                inputs = made(case.get("images", PHOTOS), image)
        made_of_it = opened(inputs, return_tensors="np", **call_of(case))
        out |= {f"{name}.{key}": kept(np.asarray(value), case) for key, value in made_of_it.items()}
        saved[name] = json.loads(opened.to_json_string())
    out["saved"] = np.asarray(json.dumps(saved, sort_keys=True))
    return out


def detected() -> dict[str, np.ndarray]:
    """What the reference finds in made-up outputs of a detector."""
    import torch
    import transformers

    logits, boxes = map(torch.from_numpy, detections())
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    processor = transformers.DetrImageProcessor()
    out: dict[str, np.ndarray] = {}
    for name, sizes in (("relative", None), ("pixels", [(480, 640), (333, 200)])):
        found = processor.post_process_object_detection(outputs, threshold=0.6, target_sizes=sizes)
        for row, objects in enumerate(found):
            out |= {f"detected.{name}.{row}.{key}": value.numpy() for key, value in objects.items()}
    return out


def segmented() -> dict[str, np.ndarray]:
    """What the reference finds in made-up outputs of a segmenter."""
    import torch
    import transformers

    logits, masks = map(torch.from_numpy, segments())
    outputs = SimpleNamespace(logits=logits, pred_masks=masks)
    processor = transformers.DetrImageProcessor()
    out: dict[str, np.ndarray] = {}
    for name, options in SEGMENTED.items():
        kind = name.partition("_")[0]
        found = getattr(processor, f"post_process_{kind}_segmentation")(outputs, **options)
        for row, image in enumerate(found):
            if kind == "semantic":
                out[f"segmented.{name}.{row}"] = image.numpy().astype(np.int16)
            else:
                out[f"segmented.{name}.{row}"] = image["segmentation"].numpy().astype(np.int16)
                out[f"segmented.{name}.{row}.info"] = np.asarray(json.dumps(image["segments_info"]))
    return out


def main() -> int:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    parser.add_argument("--any-version", action="store_true", help="use whatever version of the reference is here")
    options = parser.parse_args()
    if not options.any_version:
        from oracle.make_goldens import refuse_other_versions

        refuse_other_versions()
    DATA.mkdir(exist_ok=True)
    different = False
    for file, content in (("images", answers(IMAGES) | detected() | segmented()), ("recordings", answers(RECORDINGS))):
        path = DATA / f"{file}.npz"
        if not options.check:
            np.savez_compressed(path, allow_pickle=False, **content)
            print(f"{path.name}: {len(content)} arrays, {path.stat().st_size / 1000:.0f} kB")
            continue
        with np.load(path) as before:
            for name in sorted({*before, *content}):
                if name not in before or name not in content:
                    difference = "is in one alone"
                elif content[name].dtype.kind == "U":
                    difference = "" if str(before[name]) == str(content[name]) else "differs"
                elif before[name].shape != content[name].shape:
                    difference = f"was {before[name].shape}, is {content[name].shape}"
                else:
                    worst = np.abs(before[name].astype(np.float64) - content[name]).max(initial=0)
                    difference = f"differs by {worst:.1e}" if worst > TOLERANCE else ""
                if difference:
                    different = True
                    print(f"{path.name}: {name} {difference}")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
