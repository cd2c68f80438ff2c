"""Image processors, feature extractors and processors, against the reference's outputs in tests/data/processors/."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracle.make_processors import (
    DATA,
    IMAGES,
    PHOTOS,
    RECORDINGS,
    SEGMENTED,
    call_of,
    detections,
    image,
    kept,
    levels,
    made,
    recording,
    segments,
    write_files,
)

from formax.audio import FeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from formax.processors.auto import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, Processor
from formax.processors.files import BatchFeature, UnknownProcessorError
from formax.text.tokenizer import AutoTokenizer
from formax.vision import ImageProcessor, steps

# Pillow resamples in whole numbers, so that its releases have agreed to the bit for years; if one does not, a resized
# value is off by a grey level, 1 / 255, and the tolerance says so.
PIXELS = 1e-5
LOG_MEL = 1e-4
TOKENIZER = Path(__file__).parent / "data" / "text" / "bytelevel"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Every array of the data files; `saved` of both, together."""
    found: dict[str, Any] = {"saved": {}}
    for name in ("images", "recordings"):
        with np.load(DATA / f"{name}.npz") as file:
            found["saved"] |= json.loads(str(file["saved"]))
            found |= {key: file[key] for key in file if key != "saved"}
    return found


def expected(golden: dict[str, Any], case: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}


def assert_equal(batch: BatchFeature, wanted: dict[str, np.ndarray], case: dict[str, Any], within: float) -> None:
    assert set(batch) == set(wanted)
    for name, value in batch.items():
        part = kept(value, case)
        assert part.shape == wanted[name].shape
        np.testing.assert_allclose(part, wanted[name], rtol=0, atol=within, err_msg=name)


def inputs_of(case: dict[str, Any]) -> Any:
    if "recordings" in case:
        return made(case["recordings"], recording)
    return made(case.get("images", PHOTOS), image)


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("name", IMAGES)
def test_images_equal_the_reference(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    case = IMAGES[name]
    write_files(tmp_path, case)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    batch = processor(inputs_of(case), return_tensors="np", **call_of(case))
    assert batch.pixel_values.dtype == np.float32
    assert_equal(batch, expected(golden, name), case, PIXELS)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_equal_the_reference(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    case = RECORDINGS[name]
    write_files(tmp_path, case)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    batch = extractor(inputs_of(case), return_tensors="np", **case.get("call", {}))
    assert batch[extractor.main_input].dtype == np.float32
    assert_equal(batch, expected(golden, name), case, LOG_MEL if "whisper" in name else PIXELS)


@pytest.mark.parametrize("name", [*IMAGES, *RECORDINGS])
def test_what_is_saved_is_what_the_reference_saves(name: str, golden: dict[str, Any], tmp_path: Path) -> None:
    """The same settings under the same names, so the reference opens it; and we do."""
    case = (IMAGES | RECORDINGS)[name]
    write_files(tmp_path, case)
    auto = AutoFeatureExtractor if name in RECORDINGS else AutoImageProcessor
    processor = auto.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path / "saved")
    ours = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    theirs = golden["saved"][name]
    kind = next(key for key in ours if key.endswith("_type"))
    assert ours.pop(kind).removesuffix("Fast") == theirs.pop(kind)
    # Settings of annotations, which we do not read; and what only the type that ends in "Fast" has.
    assert set(theirs) - set(ours) <= {"format", "do_convert_annotations", "do_convert_rgb", "crop_size", "device"}
    assert set(ours) - set(theirs) <= {"do_convert_rgb", "do_center_crop", "crop_size", "do_pad", "pad_size"}
    assert {key: ours[key] or None for key in ours if key in theirs} == {
        key: theirs[key] or None for key in ours if key in theirs
    }
    assert auto.from_pretrained(tmp_path / "saved") == processor


@pytest.mark.parametrize("sizes", [None, [(480, 640), (333, 200)]])
def test_detected_objects_equal_the_reference(sizes: Any, golden: dict[str, Any]) -> None:
    import jax.numpy as jnp

    logits, boxes = detections()
    outputs = SimpleNamespace(logits=jnp.asarray(logits), pred_boxes=jnp.asarray(boxes))
    processor = ImageProcessor.of_type("DetrImageProcessor")
    found = processor.post_process_object_detection(outputs, threshold=0.6, target_sizes=sizes)
    wanted = expected(golden, f"detected.{'relative' if sizes is None else 'pixels'}")
    assert len(found) == 2
    assert 0 < len(found[0]["scores"]) < 7
    for row, objects in enumerate(found):
        for name, value in objects.items():
            np.testing.assert_allclose(value, wanted[f"{row}.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_equal_the_reference(name: str, golden: dict[str, Any]) -> None:
    logits, masks = segments()
    outputs = SimpleNamespace(logits=logits, pred_masks=masks)
    kind = name.partition("_")[0]
    process = getattr(ImageProcessor.of_type("DetrImageProcessor"), f"post_process_{kind}_segmentation")
    found = process(outputs, **SEGMENTED[name])
    assert len(found) == 2
    for row, each in enumerate(found):
        wanted = golden[f"segmented.{name}.{row}"]
        if kind == "semantic":
            assert np.array_equal(each, wanted)
            continue
        assert np.array_equal(each["segmentation"], wanted)
        infos = json.loads(str(golden[f"segmented.{name}.{row}.info"]))
        for ours, theirs in zip(each["segments_info"], infos, strict=True):
            assert ours == theirs | {"score": pytest.approx(theirs["score"], abs=2e-6)}


def test_fused_segments_do_not_lend_their_number() -> None:
    """Unlike in the reference, where the segment after a fused one can be given a number that is taken."""
    masks = np.full((1, 4, 4, 4), -9.0, np.float32)
    logits = np.full((1, 4, 4), -9.0, np.float32)
    for query, label in enumerate([0, 1, 0, 2]):
        masks[0, query, query], logits[0, query, label] = 9, 9
    outputs = SimpleNamespace(logits=logits, pred_masks=masks)
    (found,) = ImageProcessor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})
    assert [info["id"] for info in found["segments_info"]] == [1, 2, 1, 3]
    assert found["segmentation"][:, 0].tolist() == [1, 2, 1, 3]
    (runs,) = ImageProcessor.post_process_instance_segmentation(outputs, return_coco_annotation=True)
    assert runs["segmentation"] == [[1, 4], [5, 4], [9, 4], [13, 4]]


def test_a_bug_would_show(golden: dict[str, Any]) -> None:
    """Each step, done otherwise, leaves the goldens behind by far more than the tolerance."""

    def distance(case: str, **settings: Any) -> float:
        processor = ImageProcessor.from_config(IMAGES[case]["config"]).replace(**settings)
        out = processor(inputs_of(IMAGES[case]), return_tensors="np").pixel_values
        wanted = golden[f"{case}.pixel_values"]
        return np.inf if out.shape != wanted.shape else float(np.abs(out - wanted).max())

    assert distance("clip") <= PIXELS
    assert distance("clip", resample=2) > 0.01
    assert distance("clip", size=24) > 0.01
    assert distance("clip", crop_size=(22, 18)) > 0.01
    assert distance("clip", rescale_factor=1 / 256) > 0.001
    assert distance("clip", image_std=(0.26, 0.26, 0.27)) > 0.001
    assert distance("resnet", crop_pct=0.9) > 0.01
    assert distance("detr", size={"shortest_edge": 20, "longest_edge": 34}) > 0.01


# --------------------------------------------------------------------------------------------------------------- images


def test_sizes() -> None:
    assert steps.target_size(100, 200, {"max_height": 50, "max_width": 50}) == (25, 50)
    assert steps.target_size(100, 200, {"longest_edge": 50}) == (25, 50)
    assert steps.target_size(200, 100, {"longest_edge": 50}) == (50, 25)
    assert steps.target_size(37, 53, {"height": 3, "width": 4}) == (3, 4)
    assert steps.target_size(37, 53, {"shortest_edge": 20}) == (20, 28)
    assert steps.target_size(1000, 2, {"shortest_edge": 20, "longest_edge": 30}) == (30, 1)
    assert steps.size_dict({"height": 3, "width": 4, "shortest_edge": None}, square=True) == {"height": 3, "width": 4}


@pytest.mark.parametrize("shape", [(9, 12), (8, 8), (5, 13), (12, 5)])
def test_center_crop_is_of_the_size_asked_for(shape: tuple[int, int]) -> None:
    out = steps.center_crop(levels(*shape, 3), {"height": 8, "width": 9})
    assert out.shape == (8, 9, 3)


def test_images_of_every_kind_give_the_same(tmp_path: Path) -> None:
    processor = ImageProcessor.of_type("ViTImageProcessor", size=20)
    picture, array = image("RGB 37x53"), image("hwc 37x53")
    picture.save(tmp_path / "picture.png")
    alternatives = [picture, array, array.transpose(2, 0, 1), tmp_path / "picture.png", str(tmp_path / "picture.png")]
    out = processor(alternatives, return_tensors="np").pixel_values
    assert out.shape == (5, 3, 20, 20)
    assert all(np.array_equal(row, out[0]) for row in out)
    assert np.array_equal(processor(np.stack([array, array])).pixel_values, out[:2])
    last = processor(picture, data_format="channels_last").pixel_values
    assert np.array_equal(last.transpose(0, 3, 1, 2), out[:1])


def test_a_picture_three_pixels_high_keeps_its_axes() -> None:
    out = ImageProcessor.of_type("ViTImageProcessor", do_resize=False)(image("RGB 3x40")).pixel_values
    assert out.shape == (1, 3, 3, 40)


def test_grey_models_take_grey_images() -> None:
    processor = ImageProcessor.of_type("ViTImageProcessor", size=8, image_mean=[0.5], image_std=[0.5])
    assert processor([image("L 20x30"), image("RGB 20x30")]).pixel_values.shape == (2, 1, 8, 8)
    assert processor(levels(20, 30, 1)).pixel_values.shape == (1, 1, 8, 8)


def test_images_of_different_sizes_stay_a_list() -> None:
    processor = ImageProcessor.of_type("CLIPImageProcessor", size=20, do_center_crop=False)
    images = [image("RGB 37x53"), image("RGB 61x29")]
    assert [row.shape for row in processor(images).pixel_values] == [(3, 20, 28), (3, 42, 20)]
    with pytest.raises(
        ValueError, match=r"'pixel_values' has rows of shapes .*, which make no array: pass a fixed size"
    ):
        processor(images, return_tensors="np")


def test_fast_types_crop_when_told() -> None:
    settings = {"do_center_crop": True, "crop_size": 10, "size": 20}
    fast = ImageProcessor.of_type("ViTImageProcessorFast", **settings)
    assert fast(image("RGB 37x53")).pixel_values.shape[2:] == (10, 10)
    # The slow type does not know the setting, in a file too.
    slow = ImageProcessor.from_config({"image_processor_type": "ViTImageProcessor", **settings})
    assert slow(image("RGB 37x53")).pixel_values.shape[2:] == (20, 20)
    assert slow.to_dict()["crop_size"] == 10


def test_jax_arrays_in_and_out() -> None:
    import jax
    import jax.numpy as jnp

    batch = ImageProcessor.of_type("DetrImageProcessor", size={"height": 8, "width": 9})(
        jnp.asarray(image("hwc 20x30")), return_tensors="jax"
    )
    assert isinstance(batch.pixel_values, jax.Array)
    assert batch.pixel_mask.dtype == jnp.int32


def test_values_that_are_rescaled_twice_are_warned_of() -> None:
    processor = ImageProcessor.of_type("ViTImageProcessor", size=8)
    with pytest.warns(UserWarning, match="pass do_rescale=False"):
        processor(image("floats 20x30"))


VIT = ImageProcessor.of_type("ViTImageProcessor", size=8)
PICTURE = levels(20, 30, 3)
BAD_IMAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: VIT([]), "no image was given: the list is empty"),
    "no rows": (lambda: VIT(PICTURE[None][:0]), r"no image was given: the array is of shape \(0, 20, 30, 3\)"),
    "text": (lambda: VIT("a photo of a cat"), "'a photo of a cat': there is no such image file"),
    "none": (lambda: VIT(None), "image 0: an image is a PIL image, an array .* this is a NoneType"),
    "two axes": (lambda: VIT([PICTURE, PICTURE[..., 0]]), r"image 1: an array of shape \(20, 30\) is no image"),
    "five axes": (lambda: VIT(PICTURE[None, None]), r"an array of shape \(1, 1, 20, 30, 3\) is no image"),
    "objects": (lambda: VIT(np.full((3, 4, 3), "x")), "an image of dtype <U1: pixels are numbers"),
    "empty": (lambda: VIT(PICTURE[:0]), r"an image of shape \(0, 30, 3\) holds nothing"),
    "transparency": (lambda: VIT(levels(20, 30, 4)), r"or drop the transparency: image\[\.\.\., :3\]"),
    "no channels": (lambda: VIT(levels(20, 30, 5)), r"has 1 or 3 channels neither first nor last"),
    "one channel": (lambda: VIT(levels(20, 30, 1)), "an image has 1 channels, but image_mean is"),
    "levels": (lambda: VIT(PICTURE.astype(np.float32) * 2), r"holds values from .* to .*: use grey levels, 0 to 255"),
    "not finite": (lambda: VIT(np.full((8, 8, 3), np.nan)), "holds values from nan to nan"),
    "format": (lambda: VIT(PICTURE, data_format="HWC"), "data_format='HWC': use 'channels_first' or 'channels_last'"),
    "input format": (lambda: VIT(PICTURE, input_data_format="CHW"), "input_data_format='CHW'"),
    "tensors": (lambda: VIT(PICTURE, return_tensors="pt"), "return_tensors='pt': use 'np', 'jax' or None"),
    "setting": (
        lambda: VIT(PICTURE, do_rezise=False),
        "ViTImageProcessor takes no 'do_rezise'; did you mean 'do_resize'",
    ),
    "no setting": (lambda: VIT(PICTURE, crop_size=3), "ViTImageProcessor takes no 'crop_size'"),
    "size": (lambda: VIT(PICTURE, size={"height": 3}), r"size=\{'height': 3\}: use a number of pixels"),
    "size 0": (lambda: VIT(PICTURE, size=0), "use a number of pixels"),
    "filter": (lambda: VIT(PICTURE, resample="bicubic"), r"resample='bicubic': use 0 \(nearest\), .*3 \(bicubic\)"),
    "deviation": (lambda: VIT(PICTURE, image_std=[1, 0, 1]), "so it cannot be 0"),
    "mean": (lambda: VIT(PICTURE, image_mean=[0.5, 0.5]), "an image has 3 channels, but image_mean is"),
    "mean in words": (lambda: VIT(PICTURE, image_mean="imagenet"), "image_mean='imagenet': use a number"),
    "factor": (lambda: VIT(PICTURE, rescale_factor=-1), "rescale_factor=-1: use a positive number"),
    "switch": (lambda: VIT(PICTURE, do_resize="no"), "do_resize='no': use true or false"),
    "pad": (
        lambda: ImageProcessor.of_type("DetrImageProcessor", size=20, pad_size=(20, 20))(PICTURE),
        "pad_size is 20 x 20 .*, smaller than an image of 20 x 30",
    ),
    "longest": (
        lambda: ImageProcessor.of_type("DetrImageProcessor", max_size=20),
        "max_size goes with a number as size",
    ),
    "outputs": (
        lambda: VIT.post_process_object_detection({"logits": 1}),
        "outputs with logits and pred_boxes, not in a dict",
    ),
    "shapes": (
        lambda: VIT.post_process_object_detection(SimpleNamespace(logits=np.ones((1, 2)), pred_boxes=np.ones((1, 4)))),
        r"these are \(1, 2\) and \(1, 4\)",
    ),
    "masks": (lambda: VIT.post_process_semantic_segmentation(3), "with logits and pred_masks, not in a int"),
    "mask shapes": (
        lambda: VIT.post_process_instance_segmentation(
            SimpleNamespace(logits=np.ones((1, 2, 3)), pred_masks=np.ones((1, 3, 4, 5)))
        ),
        r"these are \(1, 2, 3\) and \(1, 3, 4, 5\)",
    ),
    "mask sizes": (
        lambda: VIT.post_process_panoptic_segmentation(
            SimpleNamespace(logits=np.ones((1, 2, 3)), pred_masks=np.ones((1, 2, 4, 5))), target_sizes=[3, 4]
        ),
        r"of each of the 1 images; these are \(2,\)",
    ),
    "sizes": (
        lambda: VIT.post_process_object_detection(
            SimpleNamespace(logits=np.ones((2, 3, 4)), pred_boxes=np.ones((2, 3, 4))), target_sizes=[(3, 4)]
        ),
        r"of each of the 2 images; these are \(1, 2\)",
    ),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_bad_images_have_one_clear_error(bad: str) -> None:
    call, message = BAD_IMAGES[bad]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.txt' cannot be read as an image"):
        VIT(tmp_path / "notes.txt")


# ----------------------------------------------------------------------------------------------------------- recordings


def test_masked_recordings_do_not_depend_on_their_company() -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    short, long = recording("3000"), recording("5000")
    alone, both = extractor(short), extractor([short, long], padding=True)
    assert np.array_equal(both.input_values[0, :3000], alone.input_values[0])
    assert not both.input_values[0, 3000:].any()
    assert both.attention_mask.sum(-1).tolist() == [3000, 5000]
    left = extractor.replace(padding_side="left")([short, long], padding=True)
    assert np.array_equal(left.input_values[0, 2000:], alone.input_values[0])


def test_recordings_as_lists_and_arrays_are_the_same() -> None:
    extractor = Wav2Vec2FeatureExtractor()
    wave = recording("500")
    one = extractor(wave).input_values
    assert one.shape == (1, 500)
    assert np.array_equal(extractor(wave.tolist()).input_values, one)
    assert np.array_equal(extractor(wave[None]).input_values, one)
    assert np.array_equal(extractor([wave.tolist()]).input_values, one)
    rows = extractor([wave, wave[:300]]).input_values
    assert [row.shape for row in rows] == [(500,), (300,)]


def test_whisper_hears_thirty_seconds() -> None:
    extractor = WhisperFeatureExtractor()
    out = extractor(recording("16000"), sampling_rate=16000, return_tensors="jax").input_features
    assert out.shape == (1, 80, 3000)
    assert extractor(recording("16000"), padding="longest").input_features.shape == (1, 80, 100)


WAV2VEC2, WHISPER = Wav2Vec2FeatureExtractor(), WhisperFeatureExtractor(chunk_length=1)
BAD_RECORDINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: WAV2VEC2([]), "no recording was given: the batch is empty"),
    "silence": (lambda: WAV2VEC2(np.zeros(0)), "recording 0 is empty"),
    "text": (lambda: WAV2VEC2("speech.wav"), "an array of samples, not a str: read it first"),
    "texts": (lambda: WHISPER(["speech.wav"]), "recording 0 is no array of samples"),
    "none": (lambda: WHISPER(None), "recording 0 is no array of samples: it is a NoneType"),
    "ragged": (lambda: WHISPER([[[1.0], [1.0, 2.0]]]), "recording 0 is no array of samples"),
    "stereo": (lambda: WHISPER([np.zeros((2, 50))]), r"recording 0 is of shape \(2, 50\): use one channel"),
    "three axes": (lambda: WHISPER(np.zeros((2, 2, 50))), r"is of shape \(2, 2, 50\): use one channel"),
    "rate": (
        lambda: WHISPER(np.zeros(500), sampling_rate=44100),
        "trained at 16000 samples a second and this is recorded at 44100: resample it first",
    ),
    "padding": (lambda: WAV2VEC2(np.zeros(50), padding="all"), "padding='all': use True, False, 'longest'"),
    "length": (lambda: WAV2VEC2(np.zeros(50), padding="max_length"), "padding='max_length' needs a max_length"),
    "cut": (lambda: WAV2VEC2(np.zeros(50), truncation=True), "truncation=True needs a max_length"),
    "rows": (
        lambda: WAV2VEC2([np.zeros(50), np.zeros(60)], return_tensors="np"),
        "which make no array: pass padding=True",
    ),
    "short": (lambda: WHISPER(np.zeros(50), padding=False), "50 samples is too short for a frame of 400: pad it"),
    "dither": (lambda: WhisperFeatureExtractor(dither=0.1), "dither=0.1: formax adds no noise"),
    "bands": (lambda: WhisperFeatureExtractor(feature_size=0), "feature_size=0: use a whole number above 0"),
    "two numbers": (lambda: Wav2Vec2FeatureExtractor(feature_size=2), "feature_size=2: samples are single numbers"),
    "side": (lambda: WAV2VEC2.replace(padding_side="top"), "padding_side='top': use 'right' or 'left'"),
    "setting": (lambda: WAV2VEC2.replace(sample_rate=3), "takes no 'sample_rate'; did you mean 'sampling_rate'"),
}


@pytest.mark.parametrize("bad", BAD_RECORDINGS)
def test_bad_recordings_have_one_clear_error(bad: str) -> None:
    call, message = BAD_RECORDINGS[bad]
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------- Auto classes


def folder(path: Path, **files: Any) -> Path:
    """A checkpoint folder with these JSON files."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


CLIP = {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 18, "processor_class": "CLIPProcessor"}
WHISPER_FILE = {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 1}


def with_tokenizer(path: Path) -> Path:
    shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
    return path


def test_unknown_types_are_named_with_those_there_are(tmp_path: Path) -> None:
    odd = folder(tmp_path, preprocessor_config={"image_processor_type": "OddImageProcessor"})
    with pytest.raises(
        UnknownProcessorError, match=r"no image processor 'OddImageProcessor'; there are BeitImage.*ViTIm"
    ):
        AutoImageProcessor.from_pretrained(odd)
    with pytest.raises(UnknownProcessorError, match="no image processor 'OddImageProcessor'"):
        ImageProcessor.from_pretrained(odd)
    with pytest.raises(
        UnknownProcessorError, match=r"no feature extractor .*; there are Wav2Vec2FeatureExtractor, Whisper"
    ):
        AutoFeatureExtractor.from_pretrained(odd)
    with pytest.raises(UnknownProcessorError, match="no feature extractor"):
        FeatureExtractor.from_pretrained(odd)
    with pytest.raises(UnknownProcessorError, match="there are BeitImage"):
        ImageProcessor.of_type("OddImageProcessor")
    with pytest.raises(UnknownProcessorError, match="nothing says which image processor this is; there are"):
        AutoImageProcessor.from_pretrained(folder(tmp_path, preprocessor_config={}))
    odd = folder(tmp_path, preprocessor_config={"processor_class": "OddProcessor"})
    with pytest.raises(UnknownProcessorError, match=r"no processor 'OddProcessor'; there are CLIPProcessor, Wav2Vec2"):
        AutoProcessor.from_pretrained(odd)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json, no processor_config\.json"):
        AutoProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not valid JSON"):
        AutoImageProcessor.from_pretrained(tmp_path)
    folder(tmp_path, preprocessor_config={"image_processor_type": "ViTImageProcessor", "size": "large"})
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: size='large': use a number of pixels"):
        AutoImageProcessor.from_pretrained(tmp_path)


def test_newer_files_hold_the_part_of_a_processor(tmp_path: Path) -> None:
    newer = folder(tmp_path, processor_config={"image_processor": CLIP, "processor_class": "CLIPProcessor"})
    assert AutoImageProcessor.from_pretrained(newer).crop_size == {"height": 18, "width": 18}
    newer = folder(tmp_path, processor_config={"feature_extractor": WHISPER_FILE})
    assert AutoFeatureExtractor.from_pretrained(newer).chunk_length == 1


def test_settings_are_replaced_on_loading(tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(
        folder(tmp_path, preprocessor_config=CLIP), size=30, do_center_crop=False
    )
    assert processor.size == {"shortest_edge": 30}
    assert not processor.do_center_crop
    assert processor.other == {"processor_class": "CLIPProcessor"}
    detr = folder(tmp_path, preprocessor_config={"feature_extractor_type": "DetrFeatureExtractor"})
    assert AutoFeatureExtractor.from_pretrained(detr, size=600, max_size=900).size == {
        "shortest_edge": 600,
        "longest_edge": 900,
    }


def test_processor_of_text_and_images(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder(with_tokenizer(tmp_path), preprocessor_config=CLIP))
    texts = ["A parameter", "The quick brown fox"]
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    batch = processor(text=texts, images=PICTURE, padding=True, return_tensors="np", do_normalize=False)
    tokens = processor.tokenizer(texts, padding=True, return_tensors="np")
    pixels = processor.image_processor(PICTURE, do_normalize=False).pixel_values
    assert np.array_equal(batch.input_ids, tokens.input_ids)
    assert np.array_equal(batch.pixel_values, pixels)
    assert set(batch) == {*tokens, "pixel_values"}
    # An option of the part that has nothing to do is no mistake.
    assert set(processor(images=PICTURE, padding=True)) == {"pixel_values"}
    own = processor(text="A", images=PICTURE, text_kwargs={"add_special_tokens": False}, images_kwargs={"size": 25})
    assert own.pixel_values.shape == (1, 3, 18, 18)
    assert processor.batch_decode([tokens.input_ids[0]], skip_special_tokens=True) == [
        processor.decode(tokens.input_ids[0], skip_special_tokens=True)
    ]
    for call, message in (
        (lambda: processor(), "CLIPProcessor needs images= or text="),
        (lambda: processor(PICTURE), "CLIPProcessor takes images= and text=, no audio"),
        (lambda: processor(text="A", paddin=True), "neither its tokenizer nor its image_processor has 'paddin'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_processor_of_speech(tmp_path: Path) -> None:
    files = {"preprocessor_config": WHISPER_FILE, "config": {"model_type": "whisper"}}
    processor = AutoProcessor.from_pretrained(folder(with_tokenizer(tmp_path), **files))
    batch = processor(recording("9000"), text="The dog", sampling_rate=16000)
    assert set(batch) == {"input_features", "labels"}
    assert batch.labels == processor.tokenizer("The dog").input_ids
    assert batch.input_features.shape == (1, 80, 100)
    assert set(processor(text="The dog")) == set(processor.tokenizer("The dog"))
    with pytest.raises(ValueError, match="WhisperProcessor takes audio= and text=, no images"):
        processor(images=PICTURE)


def test_processor_is_saved_whole(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder(with_tokenizer(tmp_path / "a"), preprocessor_config=CLIP))
    paths = processor.save_pretrained(tmp_path / "b")
    assert all(Path(path).is_file() for path in paths)
    again = Processor.from_pretrained(tmp_path / "b")
    assert again.image_processor == processor.image_processor
    assert again.tokenizer("The dog") == processor.tokenizer("The dog")


def test_a_processor_without_a_tokenizer_json_says_so(tmp_path: Path) -> None:
    files = {"preprocessor_config": {"do_normalize": True}, "config": {"model_type": "wav2vec2"}}
    speech = folder(tmp_path, **files)
    with pytest.raises(
        FileNotFoundError, match=r"Wav2Vec2Processor: .* has no tokenizer\.json.*AutoFeatureExtractor opens"
    ):
        AutoProcessor.from_pretrained(speech)
    assert isinstance(AutoFeatureExtractor.from_pretrained(speech), Wav2Vec2FeatureExtractor)


def test_auto_processor_of_a_model_with_one_part(tmp_path: Path) -> None:
    image_alone = folder(tmp_path / "a", preprocessor_config={"image_processor_type": "ViTImageProcessor"})
    assert isinstance(AutoProcessor.from_pretrained(image_alone), ImageProcessor)
    speech_alone = folder(tmp_path / "b", preprocessor_config=WHISPER_FILE)
    assert isinstance(AutoProcessor.from_pretrained(speech_alone), WhisperFeatureExtractor)
    text_alone = AutoProcessor.from_pretrained(TOKENIZER)
    assert text_alone("The dog") == AutoTokenizer.from_pretrained(TOKENIZER)("The dog")


@pytest.mark.parametrize("auto", [AutoImageProcessor, AutoFeatureExtractor, AutoProcessor])
def test_classes_of_a_users_own(auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        @classmethod
        def from_pretrained(cls, path: Path, **settings: Any) -> Any:
            return path, settings

    monkeypatch.setattr(auto, "_classes", {})
    auto.register("OwnProcessor", Own)
    auto.register("own_model", Own)
    kind = {"AutoImageProcessor": "image_processor_type", "AutoFeatureExtractor": "feature_extractor_type"}
    own = folder(tmp_path, preprocessor_config={kind.get(auto.__name__, "processor_class"): "OwnProcessor"})
    assert auto.from_pretrained(own, size=3) == (own, {"size": 3})
    # Also of a model type that formax knows: a user's own goes first.
    auto.register("clip", Own)
    for model_type in ("own_model", "clip"):
        by_model = folder(tmp_path, preprocessor_config={}, config={"model_type": model_type})
        assert auto.from_pretrained(by_model) == (by_model, {})
    with pytest.raises(ValueError, match="has no from_pretrained"):
        auto.register("x", object)


def test_pillow_is_imported_only_for_images_of_its_own(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np, formax.processors.auto, formax.audio\n"
        "from formax.vision import ImageProcessor\n"
        "ImageProcessor.of_type('ViTImageProcessor', do_resize=False)(np.zeros((4, 5, 3), np.uint8))\n"
        "assert not {'PIL', 'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "sys.modules['PIL'] = None\n"
        "ImageProcessor.of_type('ViTImageProcessor')(np.zeros((4, 5, 3), np.uint8))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'ImportError: images need Pillow: pip install "formax[vision]"' in run.stderr.splitlines()[-1]


# --- settings that cannot be, and files that ask for more than there is


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": {"height": 2**14, "width": 2**14}}, "images of more than 67108864 pixels are not made"),
        ({"crop_size": {"height": 10**9, "width": 10**9}}, "crop_size=.* are not made"),
        ({"size": {"height": float("inf"), "width": 4}}, "size=.*use a number of pixels"),
        ({"size": {"shortest_edge": float("nan")}}, "size=.*use a number of pixels"),
        ({"resample": [2]}, r"resample=\[2\]: use"),
        ({"resample": True}, "resample=True: use"),
        ({"resample": 2.0}, r"resample=2\.0: use"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean=.*use a number"),
        ({"rescale_factor": float("inf")}, "rescale_factor=inf: use a positive number"),
    ],
)
def test_image_settings_that_cannot_be(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ImageProcessor.from_config({"image_processor_type": "CLIPImageProcessor", **settings})


def test_an_image_is_not_made_larger_than_memory() -> None:
    """The proportions decide: a line of pixels whose short edge is made 800."""
    processor = ImageProcessor.of_type("CLIPImageProcessor", size={"shortest_edge": 800})
    with pytest.raises(ValueError, match=r"image 0: size=.* makes 800 x 400000 of an image of 4 x 2000"):
        processor(np.zeros((4, 2000, 3), np.uint8))


def test_image_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(path)
    processor = ImageProcessor.of_type("ViTImageProcessor")
    assert processor(path)["pixel_values"].shape == (1, 3, 224, 224)
    whole = path.read_bytes()
    for end in (10, 40, 60, len(whole) // 2):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cannot be read as an image"):
            processor(path)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="cannot be read as an image: Image size"):
        processor(path)


def test_values_that_are_no_pixels() -> None:
    processor = ImageProcessor.of_type("ViTImageProcessor")
    for value in (float("nan"), 1e30, -1.0, 255.5, 1.5):
        with pytest.raises(ValueError, match="use grey levels, 0 to 255, or floats from 0 to 1"):
            processor(np.full((4, 4, 3), value, np.float32))


def test_sizes_of_maps_that_cannot_be() -> None:
    out = SimpleNamespace(logits=np.zeros((1, 2, 3)), pred_masks=np.zeros((1, 2, 4, 4)))
    processor = ImageProcessor.of_type("DetrImageProcessor")
    for size in ((0, 4), (-1, 4), (2**20, 2**20)):
        with pytest.raises(ValueError, match=r"target_sizes are \(height, width\) in pixels, 1 to"):
            processor.post_process_semantic_segmentation(out, [size])


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("Whisper", {"chunk_length": 10**9}, "chunk_length=1000000000: use a whole number above 0"),
        ("Whisper", {"chunk_length": 2**20}, "are 16777216000 samples, at most"),
        ("Whisper", {"feature_size": 10**8}, "feature_size=100000000: use a whole number above 0, at most 4096"),
        ("Whisper", {"n_fft": 10**8}, "n_fft=100000000: use"),
        ("Wav2Vec2", {"do_normalize": "false"}, "do_normalize='false': use true or false"),
        ("Wav2Vec2", {"return_attention_mask": 1}, "return_attention_mask=1: use true or false"),
        ("Wav2Vec2", {"padding_value": "0"}, "padding_value='0': use a number"),
    ],
)
def test_speech_settings_that_cannot_be(kind: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FeatureExtractor.from_config({"feature_extractor_type": f"{kind}FeatureExtractor", **settings})


def test_lengths_that_cannot_be() -> None:
    """A negative length would cut the end off without a word."""
    sound = np.ones(100, np.float32)
    extractor = Wav2Vec2FeatureExtractor()
    calls: list[dict[str, Any]] = [{"max_length": -5}, {"max_length": 0}, {"pad_to_multiple_of": 0}]
    for options in calls:
        with pytest.raises(ValueError, match="use a number of samples, 1 or more"):
            extractor(sound, truncation="max_length" in options, **options)


def test_a_long_recording_is_worked_off_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from formax.audio import spectrogram

    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    extractor = WhisperFeatureExtractor()
    whole = extractor(sound, padding=False)["input_features"]
    monkeypatch.setattr(spectrogram, "BLOCK", 7)
    np.testing.assert_allclose(extractor(sound, padding=False)["input_features"], whole, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        extractor.mel_filters[0, 0] = 1


def test_maps_of_classes() -> None:
    """They are as large as the images, keep their classes, and 0 is none of them where that is said."""
    beit = ImageProcessor.from_config({"feature_extractor_type": "BeitFeatureExtractor", "reduce_labels": True})
    assert beit.do_reduce_labels
    photo, classes = levels(40, 60, 3), np.repeat(np.arange(60)[None] // 20, 40, axis=0)
    batch = beit(photo, classes, size=30, crop_size=20)
    assert batch.labels[0].shape == batch.pixel_values[0].shape[1:] == (20, 20)
    assert set(np.unique(batch.labels[0])) == {0, 1, 255}
    kept = beit([photo], [classes], do_reduce_labels=False, do_resize=False, do_center_crop=False)
    np.testing.assert_array_equal(kept.labels[0], classes)
    with pytest.raises(ValueError, match="1 segmentation_maps for 2 images"):
        beit([photo, photo], [classes])
    with pytest.raises(ValueError, match=r"segmentation map 0: use a class for every pixel, \[H, W\]"):
        beit(photo, [photo])
    with pytest.raises(ValueError, match="DetrImageProcessor pads its images"):
        ImageProcessor.of_type("DetrImageProcessor")(photo, classes)
    with pytest.raises(ValueError, match="ViTImageProcessor takes no 'do_reduce_labels'"):
        ImageProcessor.of_type("ViTImageProcessor", do_reduce_labels=True)
