"""What a model is trained for: the loss of an architecture's head, from its output and the batch.

A batch holds the model's inputs and its targets under the reference's names: `labels`, `start_positions` and
`end_positions`, `next_sentence_label`, ... `loss(model, batch)` is what the reference's model of that name returns as
`loss` when it is called with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.family import Architecture
from formax.layers import seq2seq
from formax.model import Model
from formax.training import detection, losses, speech

Batch = Mapping[str, Any]
Objective = Callable[[Any, Any, Batch], jax.Array]

# What a batch may hold that is no input of a model.
TARGETS = (
    "labels",
    "next_sentence_label",
    "sentence_order_label",
    "start_positions",
    "end_positions",
    "mc_labels",
    "sampled_negative_indices",
)


def loss(model: Model, batch: Batch, *, key: jax.Array | None = None) -> jax.Array:
    """The loss of a model on a batch, a scalar; dropout and other noise are on when a key is given.

    Raises:
        ValueError: the architecture has no objective, or the batch lacks its targets.
    """
    out = model(**inputs_of(model.architecture, model.config, batch), key=key)
    return loss_of(model, out, batch)


def inputs_of(architecture: Architecture, config: Any, batch: Batch) -> dict[str, Any]:
    """A model's inputs in a batch; the ids that a decoder reads are made from `labels` where they are missing."""
    inputs = {name: x for name, x in batch.items() if name.partition(".")[0] not in TARGETS}
    reads = {"decoder_input_ids", "decoder_inputs_embeds"}
    writes = architecture.task in ("ForSeq2SeqLM", "ForSpeechSeq2Seq", "ForVision2Seq")
    if writes and "labels" in batch and not reads & inputs.keys():
        shifted = SHIFTS.get(config.model_type, seq2seq.after_start)
        ids = inputs["decoder_input_ids"] = shifted(config, jnp.asarray(batch["labels"]))
        if config.model_type == "encoder-decoder" and "decoder_attention_mask" not in inputs:
            # there nobody looks at ignored labels
            inputs["decoder_attention_mask"] = (ids != config.pad_token_id).astype(jnp.int32)
    return inputs


def loss_of(model: Model, out: Any, batch: Batch) -> jax.Array:
    """The loss of an output of the model on a batch; see `loss`."""
    name, task = model.architecture.name, model.architecture.task
    objective = BY_NAME.get(name) or BY_TASK.get(task)
    if objective is None:
        raise ValueError(f"{name} has no objective of its own; compute a loss from its output")
    try:
        return objective(out, model.config, batch)
    except KeyError as error:
        raise ValueError(f"the loss of {name} needs {error.args[0]!r}; the batch has {', '.join(batch)}") from None


def _classes(out: Any, c: Any, batch: Batch) -> jax.Array:
    return losses.cross_entropy(out.logits, batch["labels"])


def _labels(out: Any, c: Any, batch: Batch) -> jax.Array:
    return losses.sequence_classification(out.logits, batch["labels"], c.problem_type)


def _next_token(out: Any, c: Any, batch: Batch) -> jax.Array:
    found = losses.next_token(out.logits, batch["labels"])
    balance = getattr(out, "aux_loss", None)
    return found if balance is None else found + c.router_aux_loss_coef * balance


def _span(out: Any, c: Any, batch: Batch) -> jax.Array:
    return losses.span(out.start_logits, out.end_logits, batch["start_positions"], batch["end_positions"])


def _words_and_pair(out: Any, c: Any, batch: Batch) -> jax.Array:
    words = losses.cross_entropy(out.prediction_logits, batch["labels"])
    return words + losses.cross_entropy(out.seq_relationship_logits, batch["next_sentence_label"])


def _words_and_order(out: Any, c: Any, batch: Batch) -> jax.Array:
    words = losses.cross_entropy(out.prediction_logits, batch["labels"])
    return words + losses.cross_entropy(out.sop_logits, batch["sentence_order_label"])


def _replaced(out: Any, c: Any, batch: Batch) -> jax.Array:
    return losses.binary(out.logits, batch["labels"], batch.get("attention_mask"))


def _pixels(out: Any, c: Any, batch: Batch) -> jax.Array:
    return losses.masked_pixels(out.reconstruction, batch["pixel_values"], batch["bool_masked_pos"], c.patch_size)


def _masked_patches(out: Any, c: Any, batch: Batch) -> jax.Array:
    """`labels` are those of all hidden patches, one image after the other."""
    labels = batch["labels"].reshape(-1)
    hidden = jnp.flatnonzero(batch["bool_masked_pos"], size=labels.size)
    return losses.cross_entropy(out.logits.reshape(-1, out.logits.shape[-1])[hidden], labels)


def _places(out: Any, c: Any, batch: Batch) -> jax.Array:
    labels, ignored = batch["labels"], c.semantic_loss_ignore_index
    found = losses.semantic(out.logits, labels, ignored=ignored)
    if out.auxiliary_logits is None:
        return found
    return found + c.auxiliary_loss_weight * losses.semantic(out.auxiliary_logits, labels, ignored=ignored)


def _pairs(out: Any, c: Any, batch: Batch) -> jax.Array:
    return losses.contrastive(out.logits_per_text)


def _objects(out: Any, c: Any, batch: Batch) -> jax.Array:
    targets = {name.removeprefix("labels."): x for name, x in batch.items() if name.startswith("labels.")}
    count = targets.pop("count")
    real = jnp.arange(targets["class_labels"].shape[1]) < count[:, None]
    return detection.set_loss(out, c, real=real, **targets)[0]


# Families whose decoders start otherwise than with one token for all.
SHIFTS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "mbart": seq2seq.after_language,
}
BY_TASK: dict[str, Objective] = {
    "ForAudioClassification": _classes,
    "ForCausalLM": _next_token,
    "ForCTC": speech.ctc_objective,
    "ForDoubleHeads": _next_token,
    "ForAudioFrameClassification": speech.frame_objective,
    "ForAudioXVector": speech.speaker_objective,
    "ForImageClassification": _labels,
    "ForImageSegmentation": _objects,
    "ForMaskedImageModeling": _pixels,
    "ForMaskedLM": _classes,
    "ForMultipleChoice": _classes,
    "ForNextSentencePrediction": _classes,
    "ForObjectDetection": _objects,
    "ForQuestionAnswering": _span,
    "ForSeq2SeqLM": _classes,
    "ForSemanticSegmentation": _places,
    "ForSequenceClassification": _labels,
    "ForSpeechSeq2Seq": _classes,
    "ForTokenClassification": _classes,
    "ForVision2Seq": _classes,
}
BY_NAME: dict[str, Objective] = {
    "AlbertForPreTraining": _words_and_order,
    "BertForPreTraining": _words_and_pair,
    "BigBirdForPreTraining": _words_and_pair,
    "ElectraForPreTraining": _replaced,
    # Their labels are not shifted: they are what the decoder should write, beside what it reads.
    "BartForCausalLM": _classes,
    "BeitForMaskedImageModeling": _masked_patches,
    "BlenderbotForCausalLM": _classes,
    "BlenderbotSmallForCausalLM": _classes,
    "MBartForCausalLM": _classes,
    "MarianForCausalLM": _classes,
    "PegasusForCausalLM": _classes,
    "WhisperForCausalLM": _classes,
    "CLIPModel": _pairs,
    "VisionTextDualEncoderModel": _pairs,
    "Wav2Vec2ForPreTraining": speech.pretraining_objective,
}
