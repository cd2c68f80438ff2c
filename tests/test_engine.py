"""The engine: texts that come and go at any time are each what `generate` writes of it alone."""

import asyncio
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import programs

import formax
from formax.core.config import ConfigError
from formax.generation import Engine, GenerationConfig, slots
from formax.generation.pages import PagePool, content_of
from formax.generation.requests import Handle
from formax.layers.attention import ALiBi, KVCache, Mask
from formax.layers.attention.paged import PagedCache
from formax.model import Model
from formax.sharding import make_mesh, shard

VOCABULARY = 61
ENDS = [7, 15, 23, 31, 39, 47, 55]
SHARED = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "eos_token_id": ENDS}
LAYERS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LAYERS, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 32, "bos_token_id": 7},
    "mixtral": {
        **LAYERS,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "num_local_experts": 2,
        "sliding_window": 5,
    },
    "roberta": {
        **LAYERS,
        "intermediate_size": 48,
        "is_decoder": True,
        "pad_token_id": 3,
        "max_position_embeddings": 40,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 7},
}
# One shape for all engines of a family: their programs are compiled once.
SMALL: dict[str, Any] = {"slots": 3, "page_size": 4, "max_length": 32, "chunk": 16}
MODELS: dict[str, Model] = {}


def model_of(name: str) -> Model:
    if name not in MODELS:
        config = formax.AutoConfig.for_model(name, **SHARED, **CONFIGS[name])
        MODELS[name] = formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(3))
    return MODELS[name]


@pytest.fixture
def llama() -> Model:
    return model_of("llama")


def engine_of(model: Model, **changes: Any) -> Engine:
    # A state is read in pieces of all powers of two, each of which is compiled.
    chunk = {"chunk": 4} if model.family.model_type == "mamba" else {}
    return Engine(model, **{**SMALL, **chunk, "pages": 9, **changes})


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(8, VOCABULARY, length)


def alone(model: Model, prompt: Any, count: int) -> np.ndarray:
    """What `generate` writes, in one program for all prompts of up to 16 tokens."""
    return np.asarray(model.generate(np.asarray(prompt)[None], max_new_tokens=count)[0])


def one_by_one(engine: Engine, prompt: Any, **settings: Any) -> list[int]:
    """A text that has the engine for itself."""
    return engine.submit(prompt, **settings).result()[len(prompt) :].tolist()


# ---------------------------------------------------------------------------------------------------- equal to generate


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "roberta", "mamba"])
def test_random_requests_at_random_times(family: str) -> None:
    model, rng = model_of(family), np.random.default_rng(1)
    engine = engine_of(model)
    before = programs(slots.write), programs(slots.read_piece)
    handles: list[Handle] = []
    told: dict[int, list[int]] = {}
    while len(handles) < 14 or engine.busy:
        for _ in range(rng.integers(0, 3) if len(handles) < 14 else 0):
            length, count = int(rng.integers(1, 16)), int(rng.integers(1, 16))
            handles.append(engine.submit(ids(length, len(handles)), max_new_tokens=count))
        for handle, token in engine.step():
            told.setdefault(handle.number, []).append(token)
    for handle in handles:
        expected = alone(model, handle.prompt, handle.want.most)
        np.testing.assert_array_equal(handle.result(), expected, err_msg=repr(handle))
        assert told[handle.number] == handle.tokens
        assert handle.reason == ("stop" if handle.tokens[-1] in ENDS else "length")
    assert {handle.reason for handle in handles} == {"stop", "length"}
    stats = engine.stats()
    assert stats["pages_free"] == stats["pages"] == (0 if family == "mamba" else 9)
    assert (stats["evictions"] > 0) == (family != "mamba")
    # One program writes; one reads, which cuts and fills: a state is read in pieces of 1, 2 and 4.
    after = programs(slots.write), programs(slots.read_piece)
    assert (after[0] - before[0], after[1] - before[1]) == (1, 3 if family == "mamba" else 1)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_long_prompts_are_read_in_pieces(family: str) -> None:
    model = model_of(family)
    engine = engine_of(model)
    short = engine.submit(ids(3), max_new_tokens=8)
    engine.step()
    long = engine.submit(ids(30, 5), max_new_tokens=2)
    engine.step()
    assert long.read == engine.chunk  # of 29: the others go on meanwhile
    assert len(short.tokens) == 2
    assert len(long.tokens) == 0
    whole = long.result()
    np.testing.assert_array_equal(whole[30:], model(whole[None]).logits[0, 29:-1].argmax(-1))
    np.testing.assert_array_equal(short.result(), alone(model, ids(3), 8))


# ------------------------------------------------------------------------------------------------------------- sampling


def test_what_is_drawn_depends_on_the_key_alone(llama: Model) -> None:
    draws: Any = {"max_new_tokens": 10, "temperature": 1.5, "top_k": 0, "eos_token_id": []}
    engine = engine_of(llama)
    alone = one_by_one(engine, ids(5), key=jax.random.key(4), **draws)
    assert alone != one_by_one(engine, ids(5), key=jax.random.key(5), **draws)
    # Token by token: the scores of all positions, each with a key of its own.
    scores = llama(np.concatenate([ids(5), alone])[None]).logits[0, 4:-1] / 1.5
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(10))
    assert jax.vmap(jax.random.categorical)(keys, scores).tolist() == alone
    # Among others, evicted on the way, in another slot.
    before = programs(slots.write)
    others = [engine.submit(ids(7, i), max_new_tokens=12, temperature=0.5, top_p=0.9, eos_token_id=[]) for i in (1, 2)]
    engine.step()
    handle = engine.submit(ids(5), key=jax.random.key(4), **draws)
    engine.submit(ids(9, 3), max_new_tokens=3, min_p=0.1, repetition_penalty=1.3)
    evictions = engine.evictions
    assert handle.result()[5:].tolist() == alone
    assert engine.evictions > evictions
    assert all(one.result().size == 19 for one in others)
    assert programs(slots.write) == before


def test_settings_do_what_they_do_in_generate() -> None:
    """The next token's scores through the same rules: of one row, each with its own."""
    scores = jax.random.normal(jax.random.key(0), (4, 30)) * 3
    rows, texts = slots.Rows.empty(4), np.zeros((4, 12), np.int32)
    texts[:, :6] = np.random.default_rng(0).integers(0, 30, (4, 6))
    texts[1, 6:] = int(jnp.argmax(scores[1]))  # beyond the text: nobody looks there
    for i in range(4):
        rows.put(i, live=True, length=5, count=2, top_k=30, top_p=1.0, samples=True, key=[0, i])
    rows.put(0, repetition=1.7, top_k=1)
    rows.put(1, top_p=0.0)
    rows.put(2, min_p=1.0, ends=[int(jnp.argmax(scores[2]))] + [-1] * 7, least=3)
    rows.put(3, samples=False, presence=1e9)
    texts[3, 4] = jnp.argmax(scores[3])  # written
    chosen = slots.choose(scores, rows.on_device(), jnp.asarray(texts))
    config = GenerationConfig(repetition_penalty=1.7)
    (rule,) = formax.generation.processors_of(config)
    penalised = rule(formax.generation.Tokens.of(texts[:1, :6]), scores[:1])
    assert chosen[0] == penalised[0].argmax()
    assert chosen[1] == scores[1].argmax()
    assert chosen[2] == jnp.argsort(scores[2])[-2]
    assert chosen[3] != scores[3].argmax()
    many = jnp.tile(scores[:1], (4, 1))
    rows.put(0, repetition=1.0, top_k=30)
    rows.put(1, top_p=1.0)
    rows.put(2, min_p=0.0, least=0)
    assert len(set(slots.choose(many / 9, rows.on_device(), jnp.asarray(texts)).tolist())) > 1  # keys differ


# ----------------------------------------------------------------------------------------------------------------- ends


def test_ends(llama: Model) -> None:
    engine = engine_of(llama, tokenizer={i: f"<{i}>" for i in range(VOCABULARY)})
    whole = one_by_one(engine, ids(6), max_new_tokens=12, eos_token_id=[])
    several = [engine.submit(ids(6), max_new_tokens=12, eos_token_id=[], **how) for how in (
        {"stop_strings": f"{whole[3]}><{str(whole[4])[0]}"},
        {"stop": lambda token: token == whole[5]},
        {"max_length": 9} ,
    )]  # fmt: skip
    several.append(engine.submit(ids(6), max_new_tokens=12, eos_token_id=whole[2]))
    several.append(engine.submit(ids(6), max_new_tokens=12, eos_token_id=whole[2], min_new_tokens=4))
    first = {token: whole.index(token) + 1 for token in whole}
    assert several[0].result().size - 6 <= 5
    assert several[0].tokens == whole[: len(several[0].tokens)]
    assert several[0].reason == "stop"
    assert several[1].result()[6:].tolist() == whole[: first[whole[5]]]
    assert several[3].result()[6:].tolist() == whole[: first[whole[2]]]
    assert whole[2] not in several[4].result()[6:9]
    assert several[1].logprobs[0] == pytest.approx(
        float(jax.nn.log_softmax(llama(ids(6)[None]).logits[0, -1])[whole[0]]), abs=1e-4
    )


def test_cancelled_texts_make_room(llama: Model) -> None:
    engine = engine_of(llama, slots=3)
    handles = [engine.submit(ids(10, i), max_new_tokens=15) for i in range(4)]
    engine.step()
    handles[0].cancel()
    handles[3].cancel()  # waiting
    list(engine.run())
    assert [one.reason == "cancelled" for one in handles] == [True, False, False, True]
    assert len(handles[0].tokens) == 1
    np.testing.assert_array_equal(handles[1].result(), alone(llama, handles[1].prompt, 15))
    assert handles[0].result().size == 11  # what there is
    handles[1].cancel()
    assert engine.step() == []
    assert engine.stats()["pages_free"] == 9


def test_a_callback_that_raises_ends_its_own_text(llama: Model) -> None:
    engine = engine_of(llama)
    seen: list[int] = []

    def on_token(handle: Handle, token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise OSError("the line is dead")

    broken = engine.submit(ids(4), max_new_tokens=9, on_token=on_token)
    other = engine.submit(ids(5), max_new_tokens=9)
    np.testing.assert_array_equal(other.result(), alone(llama, ids(5), 9))
    with pytest.raises(OSError, match="the line is dead"):
        broken.result()
    assert broken.reason == "error"
    assert broken.tokens == seen


# --------------------------------------------------------------------------------------------------- pages and fairness


def test_prefixes_are_shared(llama: Model) -> None:
    prompts = [np.concatenate([ids(9), ids(4, i)]) for i in range(1, 4)]
    engines = engine_of(llama, pages=24), engine_of(llama, pages=24, share_prefixes=False)
    free = []
    for engine in engines:
        handles = [engine.submit(prompt, max_new_tokens=4) for prompt in prompts]
        for _ in range(3):
            engine.step()
        free.append(engine.stats()["pages_free"])
        for handle, prompt in zip(handles, prompts, strict=True):
            np.testing.assert_array_equal(handle.result(), alone(llama, prompt, 4))
    assert free[0] - free[1] == 4  # two pages of the nine tokens, of two texts
    engine = engines[0]
    assert engine.pages_reused == 4
    # What a text has written is known as well, after its end: a conversation goes on.
    first = engine.submit(prompts[0], max_new_tokens=4).result()
    longer = np.concatenate([first, ids(3, 9)])
    assert engine.pages_reused == 4 + 3
    np.testing.assert_array_equal(engine.submit(longer, max_new_tokens=4).result(), alone(llama, longer, 4))
    assert engine.pages_reused == 4 + 3 + 4
    # Of a prompt that is there altogether, in full pages, the last one is read for its scores.
    for _ in range(2):
        np.testing.assert_array_equal(engine.submit(ids(8, 2), max_new_tokens=3).result(), alone(llama, ids(8, 2), 3))
    assert engine.pages_reused == 4 + 3 + 4 + 1
    assert engine.stats()["pages_free"] == 24


def test_pool() -> None:
    pool = PagePool(3)
    a, b = content_of(b"", [1, 2]), content_of(b"", [1, 3])
    assert content_of(a, [5]) != content_of(b, [5])
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    pool.know(first, a)
    pool.know(second, b)
    assert pool.share(a) == first
    pool.release([first])
    pool.release([first, second])
    assert pool.available == 3
    assert pool.share(content_of(b, [1])) is None
    third = pool.take()
    assert third not in (first, second)  # a blank one first
    assert pool.share(a) == first  # its content is still known
    assert pool.take() == second  # and what was in here no longer is
    assert pool.share(b) is None
    assert pool.take() is None
    assert pool.shared == 0


def test_first_come_first_served_unless_priority_says_otherwise(llama: Model) -> None:
    engine = engine_of(llama)
    handles = [engine.submit(ids(15, i), max_new_tokens=2) for i in range(3)]
    handles.append(engine.submit(ids(2, 4), max_new_tokens=1))
    urgent = engine.submit(ids(2, 5), max_new_tokens=1, priority=-1)
    order = [handle.number for handle, _ in engine.run()]
    assert order[0] == urgent.number
    # There was a page for the last one before, but not for the one before it.
    assert sorted(handles, key=lambda one: order.index(one.number)) == handles


# --------------------------------------------------------------------------------------------------- threads, iterators


def test_tokens_come_one_by_one(llama: Model) -> None:
    engine = engine_of(llama)
    expected = alone(llama, ids(5), 6)[5:].tolist()
    other = engine.submit(ids(6), max_new_tokens=6)
    assert list(engine.submit(ids(5), max_new_tokens=6)) == expected
    assert other.tokens

    async def read() -> list[list[int]]:
        async def one(prompt: np.ndarray) -> list[int]:
            return [token async for token in engine.submit(prompt, max_new_tokens=6)]

        return list(await asyncio.gather(one(ids(5)), one(ids(5))))

    assert asyncio.run(read()) == [expected] * 2
    with engine:
        assert asyncio.run(read()) == [expected] * 2
        assert engine.is_running


def test_requests_from_many_threads(llama: Model) -> None:
    results: dict[int, np.ndarray] = {}
    with engine_of(llama) as engine:

        def ask(i: int) -> None:
            results[i] = engine.submit(ids(3 + i, i), max_new_tokens=5).result(timeout=60)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        waiting = engine.submit(ids(3), max_new_tokens=20, eos_token_id=[])
        with pytest.raises(TimeoutError, match="not over"):
            waiting.result(timeout=0)
    assert waiting.reason == "cancelled"
    for i in range(6):
        np.testing.assert_array_equal(results[i], alone(llama, ids(3 + i, i), 5))
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(ids(3))


def test_an_engine_that_breaks_tells_all_who_wait(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama)

    def broken(*_: Any) -> None:
        raise MemoryError("no room on the device")

    monkeypatch.setattr(engine, "_write", broken)
    with engine:
        handle = engine.submit(ids(3))
        with pytest.raises(MemoryError, match="no room on the device"):
            handle.result(timeout=60)
    with pytest.raises(RuntimeError, match="closed") as info:
        engine.submit(ids(3))
    assert isinstance(info.value.__cause__, MemoryError)


# ------------------------------------------------------------------------------------------------------ paged attention


@pytest.mark.parametrize("bias", [None, ALiBi(jnp.array([0.5, 0.25, 0.1, 0.3]))], ids=["plain", "alibi"])
def test_pages_hold_what_a_cache_holds(bias: Any) -> None:
    """Two texts of different lengths, whose pages lie anywhere, with filling that is not kept."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, h, 8)) for i, h in ((0, 4), (1, 2), (2, 2)))
    lengths = (5, 8)
    table = jnp.array([[4, 1, 0], [2, 5, 3]])
    paged = PagedCache.empty(6, 4, 2, 8).placed(table, jnp.zeros(2, jnp.int32), jnp.array(lengths))

    def mask(cache: Any) -> Mask:
        return Mask(causal=True, window=(4, None), q_offset=cache.length)

    attend = jax.jit(lambda cache, q, k, v: cache.attend(q, k, v, mask=mask(cache), bias=bias, dropout=0.1, key=None))
    first, paged = attend(paged, q[:, :8], k[:, :8], v[:, :8])
    assert paged.length.tolist() == [5, 8]
    paged = paged.placed(table, paged.length, paged.length + 1)
    last, paged = attend(paged, q[:, 8:], k[:, 8:], v[:, 8:])
    for row, length in enumerate(lengths):
        cache, this = KVCache.empty(1, 9, 2, 8), slice(row, row + 1)
        a, cache = attend(cache, *(x[this, :length] for x in (q, k, v)))
        b, _ = attend(cache, *(x[this, 8:] for x in (q, k, v)))
        np.testing.assert_allclose(first[row, :length], a[0], atol=1e-5)
        np.testing.assert_allclose(last[row], b[0], atol=1e-5)
    with pytest.raises(TypeError, match="would write into both"):
        paged.take(jnp.array([0]))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "complaint"),
    [
        ([], {}, ValueError, "input_ids is empty"),
        ([[1, 2], [3, 4]], {}, ValueError, "the ids of one text"),
        ([1.5], {}, ValueError, "must hold token ids"),
        ([61], {}, ValueError, "holds 61 to 61, the vocabulary has 61"),
        ([-1], {}, ValueError, "holds -1 to -1"),
        ([1] * 32, {}, ValueError, "the prompt has 32 tokens, the Engine's max_length=32 leaves none"),
        ([1] * 30, {"max_new_tokens": 3}, ValueError, "30 tokens and max_new_tokens=3 are more than the Engine's max"),
        ([1] * 5, {"max_length": 5}, ValueError, "max_length=5 leaves no new token after a prompt of 5"),
        ([1], {"temprature": 1.0}, TypeError, "takes no 'temprature'; did you mean temperature"),
        ([1], {"num_beams": 4}, TypeError, r"the Engine does not do num_beams; generate\(\) does"),
        ([1], {"temperature": -1.0}, ValueError, "temperature must be a number above 0"),
        ([1], {"top_p": 1.5}, ValueError, "top_p must be a number between 0 and 1"),
        ([1], {"top_k": 1.5}, ValueError, "top_k must be"),
        ([1], {"presence_penalty": "much"}, ValueError, "presence_penalty must be a finite number"),
        ([1], {"eos_token_id": 61}, ValueError, "eos_token_id=61 is no token of a vocabulary of 61"),
        ([1], {"stop_strings": "x"}, ValueError, "stop_strings need the tokenizer"),
        ([1], {"key": 3}, TypeError, "key must be a jax.random.key"),
    ],
)
def test_bad_requests(llama: Model, prompt: Any, settings: Any, error: Any, complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        engine_of(llama).submit(prompt, **settings)


def test_bad_engines(llama: Model) -> None:
    with pytest.raises(ValueError, match="needs 8 pages, there are 7"):
        engine_of(llama, pages=7).submit(ids(20), max_new_tokens=10)
    with pytest.raises(ConfigError, match="does not do num_beams=3, which the settings ask for"):
        engine_of(llama).submit(ids(3), GenerationConfig(num_beams=3))
    for changes, complaint in (
        ({"slots": 0}, "slots=0 must be a whole number"),
        ({"pages": 0}, "pages=0"),
        ({"chunk": 24}, "chunk=24 must be a power of two"),
    ):
        with pytest.raises(ValueError, match=complaint):
            engine_of(llama, **changes)
    with pytest.raises(ValueError, match="max_length=33 is more than the 32 positions"):
        engine_of(model_of("gpt2"), max_length=33)
    with pytest.raises(TypeError, match="has no scores of a next token"):
        Engine(formax.AutoModel.from_config(llama.config, key=jax.random.key(0)))
    t5 = formax.AutoConfig.for_model("t5", vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="the Engine serves decoders alone"):
        Engine(formax.AutoModelForSeq2SeqLM.from_config(t5, key=jax.random.key(0)))


def test_an_engine_on_a_mesh_writes_the_same(llama: Model) -> None:
    prompts = [[4, 5, 6], [9, 8, 7, 6, 5, 4, 3], [11]]
    split = shard(llama, make_mesh(data=2, tensor=2))
    engine = Engine(split, **SMALL)
    handles = [engine.submit(prompt, max_new_tokens=6) for prompt in prompts]
    for _ in engine.run():
        pass
    for prompt, handle in zip(prompts, handles, strict=True):
        alone = llama.generate(np.array([prompt]), max_new_tokens=6)[0]
        np.testing.assert_array_equal(handle.result(), alone)
