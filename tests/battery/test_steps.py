"""What every architecture must satisfy in numbers, compared with itself: steps with a cache, gradients."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.compare import error, visible

from battery.families_page import MEASURES
from battery.frames import each_of_a_frame, has_a_frame, stacks
from battery.goldens import TOLERANCE, Golden, field, goldens, weighted
from battery.trace import never_read, unread
from formax.core import spec as specs

PREFILL = 17
# A key's bias adds the same to all scores of a query, which the softmax takes away.
SHIFTING = re.compile(r"\bk\.bias$")

# Tasks whose output is one row a token, so that it can be made token by token.
STEPWISE = {"", "ForCausalLM", "ForSeq2SeqLM", "ForSpeechSeq2Seq", "ForVision2Seq"}


def decodes(golden: Golden) -> bool:
    make, inputs = golden.family.init_cache, golden.inputs
    masks = ("attention_mask", "decoder_attention_mask")
    if (
        golden.architecture.task not in STEPWISE
        or make is None
        or golden.name in golden.hooks.__dict__.get("NOT_STEPWISE", ())
    ):
        return False
    reads = (
        ("decoder_input_ids", "decoder_inputs_embeds")
        if golden.config.is_encoder_decoder
        else ("input_ids", "inputs_embeds")
    )
    return (
        any(name in inputs for name in reads)
        and all(inputs[name].ndim == 2 for name in masks if name in inputs)
        and jax.eval_shape(lambda: make(golden.config, 1, 1, 1, jnp.float32)) is not None
    )


# What a family's goldens differ in, though their steps are the same: heads, labels, which files they are read from.
OF_NO_STEP = {
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
    "tie_word_embeddings",
    "pad_token_id",
    "problem_type",
}


def one_a_way() -> list[Golden]:
    """The goldens that decode, one of each configuration and kind of inputs: that with most parameters.

    Of families that decode as their relatives do, whatever the configuration is, one of each kind of inputs.
    """
    found: dict[Any, Golden] = {}
    for golden in filter(decodes, goldens()):
        config = {name: value for name, value in golden.meta["config"].items() if name not in OF_NO_STEP}
        if not has_a_frame(golden):
            config = {"is_encoder_decoder": golden.config.is_encoder_decoder}
        # A row that is padded on the left counts otherwise than one on the right.
        masks = {name: bool((x[:, 0] == 0).any()) for name, x in golden.inputs.items() if "mask" in name}
        way = json.dumps([golden.family_name, sorted(golden.inputs), masks, config], sort_keys=True)
        found[way] = max(found.get(way, golden), golden, key=lambda one: len(one.saved_keys))
    return list(found.values())


@pytest.mark.parametrize("golden", one_a_way(), ids=str)
def test_decoding_with_a_cache_is_the_full_forward(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    inputs, seq2seq = golden.inputs, golden.config.is_encoder_decoder
    output = "logits" if "logits" in golden.outputs else "last_hidden_state"
    expected = golden.outputs[output] if output in golden.outputs else field(model(**inputs), output)
    # what is about keys, not about these tokens
    of_encoder = {name: inputs.pop(name) for name in ("head_mask",) if seq2seq and name in inputs}
    whole = {name: inputs.pop(name) for name in list(inputs) if name.endswith("mask") and inputs[name].ndim == 2}
    # what is given once, then kept in the cache: the encoder's inputs, or its states
    first = of_encoder | {
        name: inputs.pop(name)
        for name in list(inputs)
        if (name.startswith("encoder_") and not name.endswith("mask")) or (seq2seq and not name.startswith("decoder_"))
    }
    memory = first.get("encoder_outputs", first.get("encoder_hidden_states"))
    if memory is None and seq2seq:
        mask = {name: whole[name] for name in ("attention_mask",) if name in whole}
        memory = model.encode(**first, **mask).last_hidden_state
    steps = next(iter(inputs.values())).shape[:2]
    cache = model.init_cache(steps[0], steps[1], 0 if memory is None else memory.shape[-2])
    parts = []
    for start, stop in ((0, PREFILL), *((i, i + 1) for i in range(PREFILL, steps[1]))):
        step = {name: array[:, start:stop] for name, array in inputs.items()}
        out = model(**step, **whole, cache=cache, **(first if start == 0 else {}))
        cache = out.cache
        parts.append(field(out, output))
    far = error(*(visible(x, golden.inputs) for x in (expected, np.concatenate(parts, axis=1))))
    assert far < TOLERANCE
    MEASURES[golden.family_name].steps[str(golden)] = far


@pytest.mark.parametrize("golden", each_of_a_frame(), ids=str)
def test_gradients_are_finite_and_not_zero(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    inputs = golden.inputs
    # Of layers in a loop there is one to compile; that they are the same is another test's (test_fold.py).
    looped = model.stack_layers() if stacks(golden) else model

    gradient = jax.jit(jax.grad(lambda model: weighted(model(**inputs))))
    found = specs.flatten(gradient(looped).unstack_layers().params)
    invisible = golden.hooks.INVISIBLE
    shown, zero = set(), set()
    for entry in specs.table(model.spec).entries:
        largest = np.abs(found[entry.path]).max()
        assert np.isfinite(largest), entry.key
        known = entry.param.buffer or any(re.search(pattern, entry.name) for pattern in invisible)
        if largest > 1e-4 or SHIFTING.search(entry.key):
            shown.add(entry.key)
        elif not known:
            zero.add(entry.key)
    declared = {entry.key for entry in specs.table(model.spec).entries}
    assert not zero or zero <= unread(golden, None), zero
    if declared - shown:
        assert never_read(golden.architecture.name, shown) == set()
