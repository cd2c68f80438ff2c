"""From what a detection model gives to objects: classes, scores and boxes in pixels."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def post_process_object_detection(
    outputs: Any, threshold: float = 0.5, target_sizes: Any = None
) -> list[dict[str, np.ndarray]]:
    """The objects whose class is surer than a threshold.

    Args:
        outputs: with `logits` [B, Q, classes + 1], the last class being "no object", and `pred_boxes` [B, Q, 4]:
            middle x, middle y, width, height as parts of the image.
        threshold: the least probability of a class.
        target_sizes: (height, width) of each image, [B, 2]; boxes stay parts of the image without it.

    Returns:
        For each image `scores` [N] and `labels` [N], and `boxes` [N, 4] as left, top, right, bottom; in the order of
        the model's queries.

    Raises:
        ValueError: outputs of another kind, or as many sizes as there are no images.
    """
    if not (hasattr(outputs, "logits") and hasattr(outputs, "pred_boxes")):
        raise ValueError(f"objects are found in outputs with logits and pred_boxes, not in a {type(outputs).__name__}")
    logits, boxes = np.asarray(outputs.logits, np.float32), np.asarray(outputs.pred_boxes, np.float32)
    if logits.ndim != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(
            f"logits are [B, Q, classes + 1] and pred_boxes [B, Q, 4]; these are {logits.shape} and {boxes.shape}"
        )
    objects = softmax(logits)[..., :-1]
    scores, labels = objects.max(-1), objects.argmax(-1)

    middle, extent = boxes[..., :2], boxes[..., 2:]
    corners = np.concatenate([middle - 0.5 * extent, middle + 0.5 * extent], -1)
    if target_sizes is not None:
        sizes = np.asarray(target_sizes, np.float32)
        if sizes.shape != (len(logits), 2):
            raise ValueError(
                f"target_sizes are (height, width) of each of the {len(logits)} images; these are {sizes.shape}"
            )
        corners = corners * sizes[:, None, [1, 0, 1, 0]]
    kept = scores > threshold
    return [
        {"scores": score[keep], "labels": label[keep], "boxes": box[keep]}
        for score, label, box, keep in zip(scores, labels, corners, kept, strict=True)
    ]
