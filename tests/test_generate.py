"""`generate` and `stream` beyond the reference's texts: padding, programs, caches, ends, chance, what is refused."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import programs
from test_generate_goldens import written

import formax
from formax.core.config import ConfigError
from formax.generation import assisted, beams, processors, sampling, stopping
from formax.generation.decoding import bucket, prefill
from formax.sharding import make_mesh, shard

KEY = jax.random.key(0)
SMALL = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def spread(model: Any, factor: float = 5.0) -> Any:
    """The model with parameters so large that it does not say the same thing again and again."""
    return model.replace(params=jax.tree.map(lambda x: factor * x if x.ndim > 1 else x, model.params))


@pytest.fixture(scope="module")
def gpt2() -> Any:
    config = formax.AutoConfig.for_model(
        "gpt2", n_embd=24, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **SMALL
    )
    return spread(formax.AutoModelForCausalLM.from_config(config, key=KEY))


@pytest.fixture(scope="module")
def llama() -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = formax.AutoConfig.for_model("llama", num_key_value_heads=2, **sizes, **SMALL)
    return spread(formax.AutoModelForCausalLM.from_config(config, key=KEY))


@pytest.fixture(scope="module")
def mamba() -> Any:
    config = formax.AutoConfig.for_model("mamba", hidden_size=24, num_hidden_layers=2, state_size=4, **SMALL)
    return spread(formax.AutoModelForCausalLM.from_config(config, key=KEY), 8.0)


@pytest.fixture(scope="module")
def t5() -> Any:
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    config = formax.AutoConfig.for_model(
        "t5", vocab_size=48, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **sizes
    )
    return spread(formax.AutoModelForSeq2SeqLM.from_config(config, key=KEY), 2.0)


@pytest.fixture(scope="module")
def roberta() -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = formax.AutoConfig.for_model("roberta", vocab_size=48, is_decoder=True, pad_token_id=3, **sizes)
    return spread(formax.AutoModelForCausalLM.from_config(config, key=KEY))


IDS = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
PLAIN: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}


def by_hand(model: Any, ids: np.ndarray, steps: int) -> np.ndarray:
    """Greedy search without caches, loops and fillings: the whole text is read for every token."""
    room = ids.shape[1] + steps
    call = jax.jit(lambda model, ids: model(ids).logits)
    for _ in range(steps):
        length = ids.shape[1]
        logits = call(model, np.pad(ids, ((0, 0), (0, room - length))))[:, length - 1]
        ids = np.concatenate([ids, np.argmax(logits, axis=-1)[:, None]], axis=1)
    return ids


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_greedy_search_is_what_one_does_by_hand(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    expected = by_hand(model, IDS, 10)
    np.testing.assert_array_equal(model.generate(IDS, **PLAIN), expected)
    np.testing.assert_array_equal(model.generate(IDS, **PLAIN, use_cache=False), expected)
    assert len(set(expected[:, 6:].ravel().tolist())) > 3  # it does not say the same again and again


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_rows_give_what_they_give_alone(name: str, side: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    mask = {
        "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
        "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
        "scattered": [[1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]],
    }[side]
    out = np.asarray(model.generate(IDS, attention_mask=mask, **PLAIN))
    np.testing.assert_array_equal(out[:, :6], IDS)  # the prompt comes back as it was
    for row, seen in zip(range(2), np.array(mask, bool), strict=True):
        alone = model.generate(IDS[row : row + 1, seen], **PLAIN)
        np.testing.assert_array_equal(out[row, 6:], np.asarray(alone)[0, seen.sum() :])


def test_positions_that_a_model_counts_itself_are_given_from_0_on(roberta: Any) -> None:
    """A call of the model counts from pad_token_id + 1; the reference's `generate` does not, padded or not."""
    out = np.asarray(roberta.generate(IDS, **PLAIN))
    for step in (6, 11):
        given = np.broadcast_to(np.arange(step), (2, step))
        logits = roberta(out[:, :step], position_ids=given).logits
        np.testing.assert_array_equal(np.argmax(logits[:, -1], axis=-1), out[:, step])
    assert not np.array_equal(np.argmax(roberta(out[:, :-1]).logits, axis=-1)[:, 5:], out[:, 6:])
    padded = np.asarray(roberta.generate(IDS, attention_mask=[[0, 0, 1, 1, 1, 1], [1] * 6], **PLAIN))
    np.testing.assert_array_equal(padded[0, 6:], np.asarray(roberta.generate(IDS[:1, 2:], **PLAIN))[0, 4:])


def test_padding_is_told_from_its_token_unless_it_ends_texts_too(gpt2: Any) -> None:
    ids = np.where(np.array([[0, 0, 1, 1, 1, 1], [1] * 6]), IDS, 0)
    told = gpt2.generate(ids, attention_mask=ids != 0, **PLAIN)
    np.testing.assert_array_equal(gpt2.generate(ids, **PLAIN), told)
    plain = gpt2.generate(ids, attention_mask=np.ones_like(ids), **PLAIN)
    assert not np.array_equal(plain, told)
    ended = np.asarray(gpt2.generate(ids, max_new_tokens=10, pad_token_id=0, eos_token_id=0))
    np.testing.assert_array_equal(ended, plain[:, : ended.shape[1]])


def test_texts_of_an_encoder_decoder_do_not_see_the_padding_of_others(t5: Any) -> None:
    mask = np.array([[1, 1, 1, 0, 0, 0], [1] * 6])
    out = np.asarray(t5.generate(IDS, attention_mask=mask, **PLAIN))
    alone = np.asarray(t5.generate(IDS[:1, :3], **PLAIN))
    np.testing.assert_array_equal(out[0], alone[0])
    assert out.shape == (2, 11)
    assert not np.array_equal(out, t5.generate(IDS, **PLAIN))


# --- programs


def test_nothing_is_compiled_again_for_another_length_or_strength(gpt2: Any) -> None:
    def sizes() -> tuple[int, int]:
        return programs(prefill), programs(sampling.go)

    settings: dict[str, Any] = {"do_sample": True, "eos_token_id": 2, "key": KEY}
    gpt2.generate(IDS, max_new_tokens=9, temperature=0.7, top_p=0.9, repetition_penalty=1.2, **settings)
    before = sizes()
    for length, new, temperature in ((6, 12, 0.7), (3, 16, 0.3), (1, 2, 1.4)):
        strengths = {"temperature": temperature, "top_p": 0.5 + temperature / 4, "repetition_penalty": 1 + temperature}
        gpt2.generate(IDS[:, :length], max_new_tokens=new, **strengths, **settings)
    next(gpt2.stream(IDS, max_new_tokens=5, temperature=0.2, top_p=0.8, repetition_penalty=1.1, **settings))
    assert sizes() == before
    gpt2.generate(np.tile(IDS, 3), max_new_tokens=9, temperature=0.7, top_p=0.9, repetition_penalty=1.2, **settings)
    assert sizes()[0] == before[0] + 1


def test_beams_too(llama: Any) -> None:
    llama.generate(IDS, num_beams=3, max_new_tokens=9, length_penalty=1.0)
    before = programs(prefill), programs(beams.begin), programs(beams.go)
    llama.generate(IDS[:, :4], num_beams=3, max_new_tokens=14, length_penalty=0.3)
    assert (programs(prefill), programs(beams.begin), programs(beams.go)) == before


def test_sizes_are_few_and_little_larger_than_asked() -> None:
    sizes = sorted({bucket(n) for n in range(1, 4097)})
    assert len(sizes) < 40
    for n in range(1, 4097):
        assert n <= bucket(n) <= max(16, 1.25 * n + 16)


# --- token by token


def test_a_stream_is_the_text(gpt2: Any) -> None:
    whole = np.asarray(gpt2.generate(IDS, max_new_tokens=10, eos_token_id=[2, 30]))
    tokens = list(gpt2.stream(IDS, max_new_tokens=10, eos_token_id=[2, 30]))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), whole[:, 6:])
    drawn = {"do_sample": True, "key": jax.random.key(3), **PLAIN}
    np.testing.assert_array_equal(
        np.stack(list(gpt2.stream(IDS, **drawn)), axis=1), np.asarray(gpt2.generate(IDS, **drawn))[:, 6:]
    )
    with pytest.raises(ValueError, match="beam_search knows its text only at the end"):
        gpt2.stream(IDS, num_beams=2)


def test_a_streamer_is_handed_the_prompt_and_every_token(gpt2: Any) -> None:
    class Collector:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, tokens: Any) -> None:
            self.got.append(np.asarray(tokens))

        def end(self) -> None:
            self.got.append("end")

    for more in ({}, {"assistant_model": gpt2}, {"prompt_lookup_num_tokens": 3}):
        collector = Collector()
        out = np.asarray(gpt2.generate(IDS[:1], streamer=collector, **PLAIN, **more))
        np.testing.assert_array_equal(collector.got[0], IDS[:1])
        assert collector.got[-1] == "end"
        np.testing.assert_array_equal(np.concatenate(collector.got[1:-1]), out[0, 6:])


# --- caches


def test_a_prompt_that_was_read_is_not_read_again(llama: Any) -> None:
    first = llama.generate(IDS, **PLAIN, return_dict_in_generate=True)
    asked = np.concatenate([np.asarray(first.sequences), [[20, 21], [22, 23]]], axis=1)
    again = llama.generate(asked, cache=first.cache, **PLAIN)
    np.testing.assert_array_equal(again, llama.generate(asked, **PLAIN))
    # what is not read comes from the cache: with another one it is another text
    other = llama.generate(IDS[::-1], **PLAIN, return_dict_in_generate=True)
    assert not np.array_equal(llama.generate(asked, cache=other.cache, **PLAIN), again)


def test_one_beginning_serves_many(llama: Any) -> None:
    begun = llama(IDS[:1], cache=llama.init_cache(1, 6)).cache
    many = np.concatenate([np.tile(IDS[:1], (3, 1)), [[20, 21], [22, 23], [24, 25]]], axis=1)
    np.testing.assert_array_equal(llama.generate(many, cache=begun, **PLAIN), llama.generate(many, **PLAIN))


def test_states_that_cannot_go_back_go_on(mamba: Any) -> None:
    begun = mamba(IDS, cache=mamba.init_cache(2, 6)).cache
    asked = np.concatenate([IDS, [[20, 21], [22, 23]]], axis=1)
    np.testing.assert_array_equal(mamba.generate(asked, cache=begun, **PLAIN), mamba.generate(asked, **PLAIN))


def test_a_cache_of_something_else_is_refused(llama: Any, gpt2: Any) -> None:
    cache = llama.init_cache(2, 3)
    with pytest.raises(ValueError, match="another model's"):
        gpt2.generate(IDS, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 3 rows, the prompt has 2"):
        llama.generate(IDS, cache=llama.init_cache(3, 3))
    with pytest.raises(ValueError, match="holds 6 positions, of a prompt of 6"):
        llama.generate(IDS, cache=llama(IDS, cache=llama.init_cache(2, 6)).cache)
    with pytest.raises(ValueError, match="a cache is given, but use_cache=False"):
        llama.generate(IDS, cache=cache, use_cache=False)
    with pytest.raises(TypeError, match="cache must be what a model's call"):
        llama.generate(IDS, cache={"a": jnp.zeros(3)})


# --- the end


def test_it_ends_where_it_is_told_to(gpt2: Any) -> None:
    free = np.asarray(gpt2.generate(IDS, **PLAIN))
    ends = int(free[0, 9])
    out = np.asarray(gpt2.generate(IDS, max_new_tokens=10, eos_token_id=ends, pad_token_id=0))
    at = free[0, 6:].tolist().index(ends) + 7
    np.testing.assert_array_equal(out[0, :at], free[0, :at])
    assert (out[0, at:] == 0).all()
    assert gpt2.generate(IDS, max_length=9).shape == (2, 9)
    assert gpt2.generate(IDS, eos_token_id=None).shape == (2, 26)  # twenty, if nobody says how many
    words = {i: chr(65 + i) for i in range(48)}
    text = "".join(words[int(i)] for i in free[0, 8:10])
    stopped = np.asarray(gpt2.generate(IDS[:1], **PLAIN, stop_strings=text, tokenizer=_Letters(words)))
    np.testing.assert_array_equal(stopped[0], free[0, :10])
    rule = stopping.custom(lambda state, scores: state.new() >= jnp.full(len(state.ids), 3))
    assert gpt2.generate(IDS, **PLAIN, stopping_criteria=[rule]).shape == (2, 9)
    assert gpt2.generate(IDS, **PLAIN, stopping_criteria=[lambda state, scores: state.new() >= 4]).shape == (2, 10)


class _Letters:
    """A tokenizer of one letter a token."""

    def __init__(self, words: dict[int, str]) -> None:
        self.words = words

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return {"input_ids": [ord(letter) - 65 for letter in text if ord(letter) - 65 in self.words]}

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in self.words.items()}

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return [self.words[i] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 3}, {"do_sample": True}])
def test_when_the_time_is_over_the_text_is_what_there_is(llama: Any, way: dict[str, Any]) -> None:
    out = llama.generate(IDS, max_new_tokens=40, eos_token_id=None, max_time=0.0, **way)
    assert 6 < out.shape[1] < 46
    if not way:
        np.testing.assert_array_equal(out, llama.generate(IDS, max_new_tokens=40, eos_token_id=None)[:, : out.shape[1]])


# --- chance


def test_what_is_drawn_follows_from_the_key(gpt2: Any) -> None:
    draw = {"do_sample": True, "num_return_sequences": 3, **PLAIN}
    one, same, other = (np.asarray(gpt2.generate(IDS, key=jax.random.key(i), **draw)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (6, 16)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    np.testing.assert_array_equal(one[:3, :6], np.tile(IDS[:1], (3, 1)))
    first, second = (np.asarray(gpt2.generate(IDS, **draw)) for _ in range(2))
    assert not np.array_equal(first, second)  # without a key, another every time
    with pytest.raises(TypeError, match=r"key must be a jax\.random\.key, got int"):
        gpt2.generate(IDS, do_sample=True, key=3)


@pytest.mark.parametrize("way", ["draft", "lower layers", "lookup"])
def test_samples_have_their_distribution_with_an_assistant(llama: Any, way: str) -> None:
    """Pairs of tokens against the probabilities that the model gives them."""
    rows, settings = 400, {"do_sample": True, "top_k": 4, "temperature": 1.5, "max_new_tokens": 3, "eos_token_id": None}
    more: dict[str, Any] = {
        "draft": {"assistant_model": llama.replace(params=jax.tree.map(lambda x: 0.9 * x, llama.params))},
        "lower layers": {"assistant_early_exit": 2, "num_assistant_tokens": 2},
        "lookup": {"prompt_lookup_num_tokens": 2},
    }[way]
    prompt = np.tile(np.array([[7, 8, 9, 7, 8, 9, 7]]), (rows, 1))
    # Rows of a batch go on together, so each batch is a sample of it.
    drawn = [np.asarray(llama.generate(prompt, key=jax.random.key(i), **settings, **more)) for i in range(4)]
    counts = Counter(tuple(row[7:9].tolist()) for one in drawn for row in one)

    def probabilities(ids: np.ndarray) -> np.ndarray:
        logits = np.asarray(llama(ids).logits[:, -1]) / 1.5
        logits[logits < np.sort(logits, axis=-1)[:, -4:-3]] = -np.inf
        return np.asarray(jax.nn.softmax(logits, axis=-1))

    first = probabilities(prompt[:1])[0]
    tokens = np.flatnonzero(first)
    second = probabilities(np.concatenate([np.tile(prompt[:1], (len(tokens), 1)), tokens[:, None]], axis=1))
    total, statistic, cells = 4 * rows, 0.0, 0
    for token, follows in zip(tokens, second, strict=True):
        for other in np.flatnonzero(follows):
            expected = total * first[token] * follows[other]
            if expected >= 5:
                statistic += (counts.pop((int(token), int(other)), 0) - expected) ** 2 / expected
                cells += 1
    assert cells >= 6
    assert statistic < cells + 5 * np.sqrt(2 * cells)
    assert all(first[a] > 0 for a, _ in counts)


def test_rows_with_an_assistant_are_those_without(llama: Any) -> None:
    for more in ({"assistant_early_exit": 2}, {"prompt_lookup_num_tokens": 4}):
        out = llama.generate(IDS, max_new_tokens=12, repetition_penalty=1.3, **more)
        np.testing.assert_array_equal(out, llama.generate(IDS, max_new_tokens=12, repetition_penalty=1.3))


def test_good_guesses_save_steps(llama: Any) -> None:
    """A draft that is the model itself is always right: every reading writes all guesses and one token more."""
    read = []

    def count(state: Any, scores: Any) -> Any:
        jax.debug.callback(lambda: read.append(1))
        return scores

    llama.generate(IDS[:1], **PLAIN, assistant_model=llama, logits_processor=[count])
    jax.effects_barrier()
    assert programs(assisted.go) >= 1
    # one for the first token, then three rounds of 4 + 4 + 1 tokens at most would do; each guess is processed twice
    assert len(read) < 60


def test_what_the_text_has_said_is_looked_up() -> None:
    ids = np.array([[5, 6, 7, 9, 5, 6, 8, 5, 6, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]])
    tokens = formax.generation.Tokens.of(ids[:, :9], room=3)
    guesses, count = assisted.lookup(tokens, 4, 2)
    np.testing.assert_array_equal(guesses, [[7, 9, 5, 6], [-1] * 4])  # after the first 5 6
    assert count == 4
    short, count = assisted.lookup(formax.generation.Tokens.of(np.array([[3, 4, 3]])), 4, 2)
    np.testing.assert_array_equal(short, [[4, 3, -1, -1]])
    assert count == 2


# --- settings


def test_settings_come_from_the_call_then_the_argument_then_the_model(gpt2: Any, tmp_path: Any) -> None:
    own = gpt2.replace(
        generation_config=formax.GenerationConfig(
            max_new_tokens=3, repetition_penalty=1.5, eos_token_id=2, pad_token_id=0
        )
    )
    assert own.generate(IDS[:, :5]).shape[1] <= 8
    asked = formax.GenerationConfig(max_new_tokens=5, eos_token_id=None)
    np.testing.assert_array_equal(
        own.generate(IDS, asked), gpt2.generate(IDS, max_new_tokens=5, repetition_penalty=1.5, eos_token_id=2)
    )
    np.testing.assert_array_equal(
        own.generate(IDS, asked, use_model_defaults=False), gpt2.generate(IDS, max_new_tokens=5, eos_token_id=2)
    )
    own.save_pretrained(tmp_path)
    again = formax.from_pretrained(tmp_path)
    assert again.generation_config == own.generation_config
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 0}')
    assert formax.from_pretrained(tmp_path).generation_config == formax.GenerationConfig()
    assert formax.from_pretrained(tmp_path).generate(IDS, max_new_tokens=2, eos_token_id=None).shape == (2, 8)


def test_rules_and_functions_of_ones_own(gpt2: Any) -> None:
    only = gpt2.generate(IDS, **PLAIN, prefix_allowed_tokens_fn=lambda row, ids: [20 + row, 30])
    assert set(np.asarray(only)[0, 6:].tolist()) <= {20, 30}
    assert set(np.asarray(only)[1, 6:].tolist()) <= {21, 30}
    banned = np.asarray(gpt2.generate(IDS, **PLAIN))[0, 6]
    for rule in (processors.suppress_tokens([banned]), lambda state, scores: scores.at[:, banned].set(-jnp.inf)):
        assert banned not in np.asarray(gpt2.generate(IDS, **PLAIN, logits_processor=[rule]))[0, 6:]
    with pytest.raises(TypeError, match="logits_processor takes rules"):
        gpt2.generate(IDS, logits_processor=[3])


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_without_a_cache_a_text_can_be_as_long_as_the_model(gpt2: Any, way: dict[str, Any]) -> None:
    ids = np.arange(2 * 60).reshape(2, 60) % 40 + 4
    settings = {"max_new_tokens": 4, "eos_token_id": None, **way}  # 64 positions
    np.testing.assert_array_equal(gpt2.generate(ids, use_cache=False, **settings), gpt2.generate(ids, **settings))


@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 4}], ids=["", "beams", "contrast"]
)
def test_vectors_in_the_place_of_tokens(gpt2: Any, way: dict[str, Any]) -> None:
    vectors, words = gpt2.params["embed"]["word"]["embedding"][IDS], gpt2.generate(IDS, **PLAIN, **way)
    np.testing.assert_array_equal(gpt2.generate(inputs_embeds=vectors, **PLAIN, **way), words[:, 6:])
    np.testing.assert_array_equal(gpt2.generate(IDS, inputs_embeds=vectors, **PLAIN, **way), words)
    with pytest.raises(ValueError, match="inputs_embeds are read once"):
        gpt2.generate(inputs_embeds=vectors, use_cache=False)
    with pytest.raises(ValueError, match=r"words of inputs_embeds.* of shape \(2, 6\), got \(2, 5\)"):
        gpt2.generate(IDS[:, 1:], inputs_embeds=vectors)


def test_an_encoder_that_ran_before(t5: Any, caplog: pytest.LogCaptureFixture) -> None:
    words, states = t5.generate(IDS, **PLAIN), t5.encode(input_ids=IDS)
    for given in (states, (states.last_hidden_state,), {"last_hidden_state": states.last_hidden_state}):
        np.testing.assert_array_equal(t5.generate(encoder_outputs=given, **PLAIN), words)
    vectors = t5.params["embed"]["word"]["embedding"][IDS]
    for way in ({}, {"num_beams": 2}):
        whole = t5.generate(IDS, **PLAIN, **way)
        np.testing.assert_array_equal(t5.generate(inputs_embeds=vectors, **PLAIN, **way), whole)
    np.testing.assert_array_equal(t5.generate(encoder_outputs=states, encoder_repetition_penalty=3.0, **PLAIN), words)
    assert "encoder_repetition_penalty looks at the words that the encoder reads" in caplog.text
    assert (t5.generate(IDS, encoder_repetition_penalty=3.0, **PLAIN) != words).any()
    heads = np.ones((2, 4), np.float32)  # layers and heads, not rows and tokens
    np.testing.assert_array_equal(t5.generate(IDS[:, :4], head_mask=heads, **PLAIN), t5.generate(IDS[:, :4], **PLAIN))


def test_a_memory_as_long_as_the_prompt() -> None:
    """What is said of each token is filled up with the prompt; what an encoder said is not, though it has the shape."""
    config = formax.AutoConfig.for_model("gpt2", add_cross_attention=True, n_embd=24, n_layer=2, n_head=4, **SMALL)
    model = spread(formax.AutoModelForCausalLM.from_config(config, key=KEY))
    states = np.random.default_rng(0).standard_normal((2, 6, 24), np.float32)
    memory = {"encoder_hidden_states": states, "encoder_attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
    text = IDS
    for _ in range(3):
        best = np.asarray(model(input_ids=text, **memory).logits[:, -1].argmax(-1))
        text = np.concatenate([text, best[:, None]], axis=1)
    settings = {"max_new_tokens": 3, "eos_token_id": None}
    np.testing.assert_array_equal(model.generate(IDS, **memory, **settings), text)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_of_beams_adds_up(llama: Any, use_cache: bool) -> None:
    """The score of each text is the sum of what guidance makes of its tokens, read anew with and without the prompt."""
    negative, scale = IDS[:, ::2], 1.7
    way: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    kept = {"return_dict_in_generate": True, "output_scores": True}
    out = llama.generate(
        IDS, negative_prompt_ids=negative, guidance_scale=scale, use_cache=use_cache, **kept, **PLAIN, **way
    )
    new = np.asarray(out.sequences)[:, 6:]

    def logarithms(prompt: np.ndarray) -> np.ndarray:
        ids = np.concatenate([np.repeat(prompt, 3, axis=0), new], axis=1)
        logits = llama(input_ids=ids).logits[:, prompt.shape[1] - 1 : -1]
        return np.asarray(jax.nn.log_softmax(logits, axis=-1))

    given, without = logarithms(IDS), logarithms(negative)
    guided = np.take_along_axis(without + scale * (given - without), new[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.sequences_scores, guided.sum(-1), rtol=1e-4)
    assert (np.diff(np.asarray(out.sequences_scores).reshape(2, 3)) <= 0).all()


def test_a_model_on_a_mesh_writes_the_same(llama: Any) -> None:
    split = shard(llama, make_mesh(data=2, tensor=2))
    assert len(split.params["layers"][0]["mlp"]["up"]["kernel"].sharding.device_set) == 4
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}]
    for way in ways:
        np.testing.assert_array_equal(split.generate(IDS, **PLAIN, **way), llama.generate(IDS, **PLAIN, **way))


WHOLE: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
)


@pytest.mark.parametrize("name", ["gpt2", "mamba", "t5"])
@pytest.mark.parametrize("way", WHOLE, ids=["greedy", "beams", "sample"])
def test_in_a_program_of_ones_own(name: str, way: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """The same texts, each as long as it may become, also of padded rows and for other values of the inputs."""
    model = request.getfixturevalue(name)
    key = KEY if "do_sample" in way else None
    settings = {"max_new_tokens": 10, "eos_token_id": 7, "repetition_penalty": 3.0, **way}
    generate = jax.jit(lambda model, ids, mask, key: model.generate(ids, attention_mask=mask, key=key, **settings))
    texts = set()
    for ids, mask in (
        (IDS, np.array([[0, 0, 1, 1, 1, 1], [1] * 6])),
        (IDS + 3, np.array([[1] * 6, [1, 1, 1, 1, 1, 0]])),
    ):
        expected = np.asarray(model.generate(ids, attention_mask=mask, key=key, **settings))
        found = np.asarray(generate(model, ids, mask, key))
        start = 1 if name == "t5" else ids.shape[1]
        assert found.shape == (len(expected), start + 10)
        np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
        assert (found[:, expected.shape[1] :] == 0).all()
        texts.add(found[:, start:].tobytes())
    assert len(texts) == 2
    assert programs(generate) == 1


def test_what_a_program_of_ones_own_cannot_do_is_refused(gpt2: Any) -> None:
    def call(**given: Any) -> Any:
        return jax.jit(lambda ids: gpt2.generate(ids, max_new_tokens=5, **given))(IDS)

    for given, why in (
        ({"penalty_alpha": 0.6, "top_k": 3}, "looks at its tokens on the way"),
        ({"max_time": 1.0}, "looks at the clock"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits is about is known at the end"),
        ({"do_sample": True}, "a key is needed"),
        ({"streamer": object()}, "nothing to show in a trace"),
    ):
        with pytest.raises(TypeError, match=why):
            call(**given)
    with pytest.raises(TypeError, match="a trace"):
        jax.jit(lambda ids: list(gpt2.stream(ids, max_new_tokens=5)))(IDS)


def test_a_changed_model_writes_what_it_would_have_said(llama: Any) -> None:
    deaf = formax.intervene(llama, {"layers.1.mlp.out": lambda x: 0 * x})
    out = deaf.generate(IDS, **PLAIN)
    np.testing.assert_array_equal(out, by_hand(deaf, IDS, 10))
    assert not np.array_equal(out, llama.generate(IDS, **PLAIN))


def test_what_is_kept_of_every_step(llama: Any, t5: Any) -> None:
    asked = {"output_scores": True, "output_attentions": True, "output_hidden_states": True}
    out = llama.generate(IDS, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True, **asked)
    assert [[x.shape for x in step] for step in out.attentions] == [
        [(2, 4, 6, 6)] * 3,
        [(2, 4, 1, 7)] * 3,
        [(2, 4, 1, 8)] * 3,
    ]
    assert [[x.shape[1] for x in step] for step in out.hidden_states] == [[6] * 4, [1] * 4, [1] * 4]
    whole = llama(out.sequences[:, :-1], output_hidden_states=True, output_attentions=True)
    for step, at in ((1, 6), (2, 7)):
        np.testing.assert_allclose(out.hidden_states[step][-1][:, 0], whole.hidden_states[-1][:, at], atol=2e-4)
        row = whole.attentions[1][:, :, at, : at + 1]
        np.testing.assert_allclose(out.attentions[step][1][:, :, 0], row, atol=2e-4)
    np.testing.assert_allclose(jnp.stack(out.scores, axis=1), whole.logits[:, 5:], atol=2e-3)
    found = llama.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    logs = jax.nn.log_softmax(whole.logits[:, 5:], axis=-1)
    np.testing.assert_allclose(found, jnp.take_along_axis(logs, out.sequences[:, 6:, None], axis=-1)[..., 0], atol=2e-3)
    seq = t5.generate(IDS, max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True, **asked)
    assert {name for name, _ in seq.items()} == {
        "sequences", "scores", "encoder_attentions", "encoder_hidden_states", "decoder_attentions",
        "cross_attentions", "decoder_hidden_states", "cache",
    }  # fmt: skip
    assert seq.cross_attentions[1][0].shape == (2, 4, 1, 6)
    assert seq.past_key_values is seq.cache


# --- what is refused


def test_bad_input_is_refused_before_anything_is_compiled(gpt2: Any, t5: Any, caplog: Any) -> None:
    before = programs(prefill)
    with pytest.raises(ValueError, match=r"input_ids of shape \(1, 0\) is empty"):
        gpt2.generate(np.zeros((1, 0), int))
    with pytest.raises(ValueError, match="rows of different lengths"):
        gpt2.generate([[1, 2], [3]])
    with pytest.raises(ValueError, match="holds tokens 5 to 48, the vocabulary has 48"):
        gpt2.generate([[5, 48]])
    with pytest.raises(ValueError, match="the prompt has 64 tokens, the model 64 positions"):
        gpt2.generate(np.ones((1, 64), int))
    with pytest.raises(ValueError, match="more than the 64 positions of the model"):
        gpt2.generate(IDS, max_new_tokens=60)
    with pytest.raises(ValueError, match="max_length=6 counts them: nothing is left"):
        gpt2.generate(IDS, max_length=6)
    with pytest.raises(ValueError, match="row 1 of the prompt is padding throughout"):
        gpt2.generate(IDS, attention_mask=[[1] * 6, [0] * 6])
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\] as the tokens"):
        gpt2.generate(IDS, attention_mask=np.ones((2, 5)))
    with pytest.raises(TypeError, match=r"takes no 'max_new_token'.*did you mean max_new_tokens"):
        gpt2.generate(IDS, max_new_token=3)
    with pytest.raises(ValueError, match="token_healing needs the tokenizer of the model"):
        gpt2.generate(IDS, token_healing=True)
    with pytest.raises(ConfigError, match="eos_token_id=99 is no token of the model"):
        gpt2.generate(IDS, eos_token_id=99)
    with pytest.raises(ConfigError, match="num_return_sequences=2 needs do_sample=True or num_beams > 1"):
        gpt2.generate(IDS, num_return_sequences=2)
    with pytest.raises(ValueError, match="negative_prompt_ids has an effect only with a guidance_scale"):
        gpt2.generate(IDS, negative_prompt_ids=IDS)
    with pytest.raises(ValueError, match="negative_prompt_ids has an effect only with a guidance_scale"):
        gpt2.generate(IDS, negative_prompt_ids=IDS, num_beams=2)
    with pytest.raises(ValueError, match="60 tokens of negative_prompt_ids and 5 new ones are more than the 64"):
        gpt2.generate(IDS, negative_prompt_ids=IDS.repeat(10, axis=1), guidance_scale=2.0, max_new_tokens=5)
    with pytest.raises(ValueError, match="go with greedy search, sampling and beams, not with contrastive_search"):
        gpt2.generate(IDS, guidance_scale=2.0, penalty_alpha=0.6, top_k=4)
    with pytest.raises(ValueError, match="go with greedy search, sampling and beams, not with assisted"):
        gpt2.generate(IDS, negative_prompt_ids=IDS, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration writes about what it reads: give input_ids"):
        t5.generate(decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="encoder_outputs has 1 rows, input_ids has 2"):
        t5.generate(IDS, encoder_outputs=(np.zeros((1, 6, 24), np.float32),))
    with pytest.raises(ValueError, match="decoder_input_ids has 1 rows, input_ids has 2"):
        t5.generate(IDS, decoder_input_ids=[[3]])
    with pytest.raises(ConfigError, match="'low', 'high' or a list"):
        gpt2.generate(IDS, dola_layers="middle")
    with pytest.raises(ValueError, match="constraints want beams"):
        gpt2.generate(IDS, force_words_ids=[[3]])
    with pytest.raises(ValueError, match="groups want as many beams each"):
        gpt2.generate(IDS, num_beams=4, num_beam_groups=3, diversity_penalty=1.0)
    classifier = formax.AutoModelForSequenceClassification.from_config(gpt2.config, key=KEY)
    with pytest.raises(TypeError, match="GPT2ForSequenceClassification has no scores of a next token"):
        classifier.generate(IDS)
    stacked = gpt2.stack_layers()
    with pytest.raises(TypeError, match=r"unstack_layers\(\) first"):
        stacked.generate(IDS)
    assert programs(prefill) == before
    with caplog.at_level(logging.WARNING, "formax"):
        gpt2.generate(IDS, max_new_tokens=2, max_length=30, temperature=0.5)
    assert "max_new_tokens=2 counts" in caplog.text
    assert "temperature=0.5 has an effect only with do_sample=True" in caplog.text


def test_assistants_that_cannot_help_are_refused(gpt2: Any, t5: Any, mamba: Any, llama: Any) -> None:
    large = formax.AutoModelForCausalLM.from_config(gpt2.config.replace(vocab_size=50), key=KEY)
    with pytest.raises(ValueError, match="the assistant has a vocabulary of 50, the model one of 48"):
        gpt2.generate(IDS, assistant_model=large)
    with pytest.raises(ValueError, match="takes other inputs than"):
        gpt2.generate(IDS, assistant_model=t5)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot take back tokens"):
        mamba.generate(IDS, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assistant_early_exit=3 must be below the number of layers, 3"):
        llama.generate(IDS, assistant_early_exit=3)


def test_groups_and_constraints_do_what_they_are_for(llama: Any) -> None:
    beams_of = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6, "eos_token_id": None}
    alike = np.asarray(llama.generate(IDS[:1], **beams_of))[:, 6:]
    apart = np.asarray(llama.generate(IDS[:1], num_beam_groups=2, diversity_penalty=50.0, **beams_of))[:, 6:]
    assert len(set(apart[:, 0].tolist())) > len(set(alike[:, 0].tolist()))
    said = np.asarray(
        llama.generate(IDS[:1], force_words_ids=[[33, 20], [[5], [6, 7]]], **beams_of | {"num_return_sequences": 1})
    )
    text = " ".join(map(str, said[0].tolist()))
    assert " 33 20" in text


def test_healing_chooses_the_end_of_a_prompt_anew() -> None:
    tokenizer = formax.AutoTokenizer.from_pretrained(Path(__file__).parent / "data" / "text" / "bytelevel")
    vocabulary = tokenizer.get_vocab()
    config = formax.AutoConfig.for_model("gpt2", n_embd=24, n_layer=1, n_head=4, vocab_size=len(vocabulary))
    model = spread(formax.AutoModelForCausalLM.from_config(config, key=KEY))
    begun = max((token for token in vocabulary if len(token) > 1), key=lambda one: len(beginning(vocabulary, one)))
    among = beginning(vocabulary, begun)
    assert len(among) > 2
    prompts = np.array([[5, 9, 12, vocabulary[begun]], [0, 0, 7, vocabulary[begun]]])
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    own: Any = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 1, "pad_token_id": 0}
    found = np.asarray(model.generate(prompts, attention_mask=mask, **own))[:, 3]
    for row, before in enumerate(([5, 9, 12], [7])):
        scores = np.array(model(np.array([before])).logits[0, -1])
        scores[vocabulary[begun]] += 1
        assert found[row] == among[int(scores[among].argmax())]
    assert set(found) - {vocabulary[begun]}  # it is a choice
    whole = next(index for token, index in vocabulary.items() if len(beginning(vocabulary, token)) == 1)
    assert model.generate([[5, whole]], **own)[0, 1] == whole
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(prompts, attention_mask=mask[:, ::-1], **own)


def test_healing_equals_the_reference(tmp_path: Path) -> None:
    """`tests/oracle/make_healing.py` says where the reference cannot be followed."""
    data = Path(__file__).parent / "data"
    golden = json.loads((data / "healing.json").read_text())
    model = formax.from_pretrained(written(tmp_path, golden["model"], {}))
    tokenizer = formax.AutoTokenizer.from_pretrained(data / "text" / "bytelevel")
    changed = 0
    for text, case in golden["cases"].items():
        given: Any = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 1}
        found = np.asarray(model.generate([case["ids"]], **given))[0, :-1].tolist()
        assert found == case["healed"], text
        changed += found != case["ids"]
    assert 0 < changed < len(golden["cases"])


def beginning(vocabulary: dict[str, int], token: str) -> list[int]:
    return [index for one, index in vocabulary.items() if one.startswith(token)]
