"""From what a segmentation model gives to maps: a class or a segment for every pixel.

Axes: B images, Q queries, H and W of a mask.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from formax.vision.detection import softmax
from formax.vision.steps import MAX_PIXELS


def resize_bilinear(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """[N, H, W] -> [N, height, width] by the four pixels around each middle, whatever the factor."""
    return _weights(maps.shape[1], height) @ maps @ _weights(maps.shape[2], width).T


def _weights(given: int, wanted: int) -> np.ndarray:
    """What each pixel of a line counts in each pixel of the resized line, [wanted, given]."""
    place = np.maximum((np.arange(wanted) + 0.5) * (given / wanted) - 0.5, 0)
    left = np.minimum(place.astype(np.int64), given - 1)
    share = (place - left).astype(np.float32)
    out = np.zeros((wanted, given), np.float32)
    rows = np.arange(wanted)
    np.add.at(out, (rows, left), 1 - share)
    np.add.at(out, (rows, np.minimum(left + 1, given - 1)), share)
    return out


def _read(outputs: Any, target_sizes: Any) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int] | None]]:
    """Probabilities of classes [B, Q, classes + 1] and of masks [B, Q, H, W], and the size of each image.

    Raises:
        ValueError: outputs of another kind, or as many sizes as there are no images.
    """
    if not (hasattr(outputs, "logits") and hasattr(outputs, "pred_masks")):
        raise ValueError(f"segments are found in outputs with logits and pred_masks, not in a {type(outputs).__name__}")
    logits, masks = np.asarray(outputs.logits, np.float32), np.asarray(outputs.pred_masks, np.float32)
    if logits.ndim != 3 or masks.ndim != 4 or masks.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"logits are [B, Q, classes + 1] and pred_masks [B, Q, H, W]; these are {logits.shape} and {masks.shape}"
        )
    sizes: list[tuple[int, int] | None] = [None] * len(logits)
    if target_sizes is not None:
        pairs = np.asarray(target_sizes)
        if pairs.shape != (len(logits), 2):
            raise ValueError(
                f"target_sizes are (height, width) of each of the {len(logits)} images; these are {pairs.shape}"
            )
        for height, width in pairs.tolist():
            if min(height, width) < 1 or height * width > MAX_PIXELS:
                raise ValueError(
                    f"target_sizes are (height, width) in pixels, 1 to {MAX_PIXELS} in all; one is {(height, width)}"
                )
        sizes = [(int(height), int(width)) for height, width in pairs]
    with np.errstate(over="ignore"):  # exp of a great negative logit is infinite, and its probability 0
        probabilities = 1 / (1 + np.exp(-masks))
    return softmax(logits), probabilities, sizes


def post_process_semantic_segmentation(outputs: Any, target_sizes: Any = None) -> list[np.ndarray]:
    """The class of every pixel.

    Args:
        outputs: with `logits` [B, Q, classes + 1], the last class being "no object", and `pred_masks` [B, Q, H, W].
        target_sizes: (height, width) of each image, [B, 2]; the masks' own by default.

    Returns:
        For each image its classes [height, width], int64.

    Raises:
        ValueError: outputs of another kind, or as many sizes as there are no images.
    """
    classes, masks, sizes = _read(outputs, target_sizes)
    scores = np.einsum("bqc,bqhw->bchw", classes[..., :-1], masks)
    resized = [row if size is None else resize_bilinear(row, *size) for row, size in zip(scores, sizes, strict=True)]
    return [row.argmax(0) for row in resized]


def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    target_sizes: Any = None,
) -> list[dict[str, Any]]:
    """The segment of every pixel, and what each segment is.

    Args:
        outputs: with `logits` [B, Q, classes + 1], the last class being "no object", and `pred_masks` [B, Q, H, W].
        threshold: the least probability of a query's class.
        mask_threshold: the least probability, times the class's, of a pixel that counts as the query's.
        overlap_mask_area_threshold: the least part of these pixels that must be left to it by the other queries.
        label_ids_to_fuse: classes of which there is one segment in an image, such as the sky.
        target_sizes: (height, width) of each image, [B, 2]; the masks' own by default.

    Returns:
        For each image `segmentation` [height, width], int32: the id of each pixel's segment from 1 on, 0 where there is
        none, -1 everywhere in an image without a sure query; and `segments_info`, a list of dictionaries of `id`,
        `label_id`, `was_fused` and `score`, one a query.

    Raises:
        ValueError: outputs of another kind, or as many sizes as there are no images.
    """
    classes, masks, sizes = _read(outputs, target_sizes)
    fused = frozenset(label_ids_to_fuse or ())
    found = []
    for scores, maps, size in zip(classes, masks, sizes, strict=True):
        best, labels = scores.max(-1), scores.argmax(-1)
        sure = (labels != scores.shape[-1] - 1) & (best > threshold)
        if not sure.any():
            found.append({"segmentation": np.full(size or maps.shape[1:], -1, np.int32), "segments_info": []})
            continue
        best, labels, maps = best[sure], labels[sure], maps[sure]
        maps = best[:, None, None] * (maps if size is None else resize_bilinear(maps, *size))
        found.append(_segments(maps, best, labels, mask_threshold, overlap_mask_area_threshold, fused))
    return found


def _segments(
    masks: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    mask_threshold: float,
    overlap: float,
    fused: Collection[int],
) -> dict[str, Any]:
    """The segments of one image, of its sure queries: masks [Q, H, W] times their scores [Q], labels [Q]."""
    owner = masks.argmax(0)
    segmentation = np.zeros(owner.shape, np.int32)
    infos: list[dict[str, Any]] = []
    of_label: dict[int, int] = {}
    last = 0
    for query, label in enumerate(labels.tolist()):
        won, wanted = owner == query, int((masks[query] >= mask_threshold).sum())
        if not (won.any() and wanted and won.sum() / wanted > overlap):
            continue
        segment = of_label.get(label) if label in fused else None
        if segment is None:
            last = segment = last + 1
            of_label[label] = segment
        segmentation[won] = segment
        score = round(float(scores[query]), 6)
        infos.append({"id": segment, "label_id": label, "was_fused": label in fused, "score": score})
    return {"segmentation": segmentation, "segments_info": infos}


def post_process_instance_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Any = None,
    return_coco_annotation: bool = False,
) -> list[dict[str, Any]]:
    """The object of every pixel: as `post_process_panoptic_segmentation`, with nothing fused.

    With `return_coco_annotation` the maps are run lengths, a list for each id in the order of ids: start (from 1) and
    length of every run of its pixels, line by line.
    """
    found = post_process_panoptic_segmentation(
        outputs, threshold, mask_threshold, overlap_mask_area_threshold, None, target_sizes
    )
    for image in found if return_coco_annotation else ():
        if image["segments_info"]:
            image["segmentation"] = _runs(image["segmentation"])
    return found


def _runs(segmentation: np.ndarray) -> list[list[int]]:
    """Run lengths of every id in a map."""
    out = []
    for index in np.unique(segmentation):
        mask = np.concatenate([[0], (segmentation == index).ravel(), [0]])
        starts, ends = np.flatnonzero(np.diff(mask) == 1) + 1, np.flatnonzero(np.diff(mask) == -1) + 1
        out.append(np.stack([starts, ends - starts], -1).ravel().tolist())
    return out
