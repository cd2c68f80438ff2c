"""BigBird where it differs from what its goldens show: drawn blocks, memory, attention by blocks, cross-attention."""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.goldens import Golden

import formax
from formax.core import registry
from formax.core import spec as specs
from formax.layers import text_encoder
from formax.layers.attention import Mask, attention
from formax.layers.block_sparse import drawn_blocks, sparse_attention, weights
from formax.models.text import bert, big_bird
from formax.models.text.big_bird import BigBirdConfig

KEY = jax.random.key(0)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


# --- which blocks are drawn, by transformers 4.57.6 in training


def test_few_drawn_blocks_are_the_references() -> None:
    """Arguments: tokens, tokens of a block, blocks, heads, seed, positions."""
    first = [6, 4, 7, 5, 1, 5, 6, 1, 2, 7, 2, 3, 5, 4, 3, 6, 3, 1, 7, 4, 7, 6]
    np.testing.assert_array_equal(drawn_blocks(26, 2, 2, 3, 1, 64)[0].ravel(), first)
    old = [[6, 5, 1, 1, 1, 2], [4, 6, 5, 1, 3, 3]]
    np.testing.assert_array_equal(drawn_blocks(1024, 128, 1, 2, 3, 2048)[..., 0], old)


@pytest.mark.parametrize(("length", "seed", "crc"), [(1024, 0, 386126663), (2048, 7, 551737504), (4096, 11, 478820847)])
def test_drawn_blocks_of_the_published_size_are_the_references(length: int, seed: int, crc: int) -> None:
    drawn = drawn_blocks(length, 64, 3, 12, seed, 4096)
    assert drawn.shape == (12, length // 64 - 2, 3)
    assert zlib.crc32(drawn.astype(np.int32).tobytes()) == crc


def test_too_few_blocks_to_draw_of() -> None:
    with pytest.raises(ValueError, match="2 blocks of 256 tokens cannot be drawn of 1"):
        drawn_blocks(3072, 256, 2, 2, 5, 4096)


# --- attention


def by_pairs(n: int, block: int, drawn: np.ndarray, keys: np.ndarray, repeats: int) -> np.ndarray:
    """How often each query looks at each key: [B, H, T, T]."""
    times = np.zeros((len(drawn), n, n))
    times[:, [0, -1]] = 1
    for i in range(1, n - 1):
        times[:, i, [*{0, i - 1, i, i + 1, n - 1}]] = 1
        times[:, i, 0] += repeats
        for h, picked in enumerate(drawn[:, i - 1]):
            np.add.at(times[h, i], picked, 1)
    return times.repeat(block, 1).repeat(block, 2)[None] * keys[:, None, None, :]


@pytest.mark.parametrize(("length", "training"), [(24, False), (24, True), (22, False), (22, True)])
def test_attention_by_blocks_is_attention_to_these_pairs(length: int, training: bool) -> None:
    block, count, heads, n = 3, 1, 2, 8
    drawn = drawn_blocks(24, block, count, heads, 0, 64) if training else np.zeros((heads, n - 2, 0), int)
    repeats = 0 if training else 2
    q, k, v = jax.random.normal(KEY, (3, 2, length, heads, 5))
    keys = np.ones((2, length), bool)
    keys[1, 4:9] = keys[1, -2:] = False
    times = by_pairs(n, block, drawn, np.pad(keys, ((0, 0), (0, 24 - length))), repeats)[..., :length, :length]
    expected = attention(q, k, v, mask=Mask(dense=jnp.asarray(times > 0)), bias=jnp.log(jnp.maximum(times, 1)))
    how: dict[str, Any] = {"block": block, "keys": jnp.asarray(keys), "repeats": repeats}
    how["drawn"] = jnp.asarray(drawn) if training else None
    found = sparse_attention(q, k, v, **how)
    np.testing.assert_allclose(found, np.where(keys[..., None, None], expected, 0), atol=1e-5)
    shown = weights(q, k, **how) * jnp.maximum(times, 1)
    np.testing.assert_allclose(jnp.einsum("bhts,bshd->bthd", shown, v), found, atol=1e-5)


def memory(length: int) -> int:
    c = BigBirdConfig(**SIZES, block_size=16, num_random_blocks=1)
    params = specs.abstract(registry.family("big_bird").architectures[0].spec(c))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = jax.jit(lambda p, ids: big_bird.model(p, c, ids).last_hidden_state)
    found = run.lower(params, ids).compile().memory_analysis()
    assert found is not None
    return int(found.temp_size_in_bytes)


def test_memory_grows_with_the_text_and_not_with_its_square() -> None:
    """A table of all pairs would take 64 times as much: 3 heads x 4096 x 4096 numbers are 201 MB."""
    short, long = memory(512), memory(4096)
    assert long < 8.5 * short
    assert long < 40e6


def test_states_in_training_are_the_references(tmp_path: Path) -> None:
    """Of transformers' model after `train()`, this golden's checkpoint with dropout 0: numbers of three tokens."""
    golden = Golden("big_bird", "left_padded")
    model, _ = golden.open(tmp_path)
    still = model.config.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = model.replace(config=still)(**golden.inputs, key=KEY).last_hidden_state
    expected = [
        [[0.799645, 0.415715, -1.069032], [1.539216, 0.718913, -1.704912], [1.804894, 0.685527, -1.002706]],
        [[1.647197, 1.007955, -1.287653], [1.160172, 1.421133, -1.155512], [1.520089, 0.975544, -1.357197]],
    ]
    np.testing.assert_allclose(found[:, jnp.array([0, 8, 24]), :3], expected, atol=1e-5)


# --- full attention


def test_a_text_too_short_for_blocks_and_a_decoder_are_read_as_bert_reads_them() -> None:
    sizes = SIZES | {"is_decoder": True, "add_cross_attention": True, "hidden_act": "gelu_new"}
    theirs = bert.BertConfig(**sizes)
    ours = BigBirdConfig(**sizes, block_size=2, num_random_blocks=1)
    params = specs.init(text_encoder.encoder_spec(theirs), KEY)
    ids = jax.random.randint(KEY, (2, 20), 0, 61)
    memory = jax.random.normal(KEY, (2, 7, 24))
    expected, _ = bert.encode(params, theirs, ids, encoder_hidden_states=memory)
    found, _ = big_bird.encode(params, ours, ids, encoder_hidden_states=memory)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_mask_of_pairs_cannot_be_cut_into_blocks() -> None:
    c = BigBirdConfig(**SIZES, block_size=2, num_random_blocks=1)
    params = specs.init(big_bird.encoder_spec(c), KEY)
    with pytest.raises(
        ValueError, match=r"20 tokens are read block by block: attention_mask must be \[batch, length\]"
    ):
        big_bird.encode(params, c, jnp.ones((2, 20), int), jnp.ones((2, 20, 20)))


# --- as the encoder of another model


@pytest.mark.parametrize("length", [28, 33])
def test_generate_reads_a_text_as_long_as_it_is(length: int) -> None:
    """28 tokens are read with full attention, 32 would not be; and the last block of 33 is not that of 48."""
    encoder = formax.AutoConfig.for_model("big_bird", block_size=4, num_random_blocks=1, **SIZES)
    decoder = formax.AutoConfig.for_model(
        "gpt2", vocab_size=61, n_embd=24, n_layer=1, n_head=4, is_decoder=True, add_cross_attention=True
    )
    model = formax.encoder_decoder(
        formax.AutoModel.from_config(encoder, key=KEY), formax.AutoModelForCausalLM.from_config(decoder, key=KEY)
    )
    wide = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.params)  # so that it matters what is read
    model = dataclasses.replace(model, params=wide)
    ids = np.random.default_rng(length).integers(4, 61, (2, length))
    start: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **start)
    logits = model(input_ids=ids, decoder_input_ids=np.ones((2, 1), np.int32)).logits[:, 0]
    np.testing.assert_allclose(out.logits[0], logits, rtol=1e-4, atol=1e-4)
