"""Sentence embeddings: equal to sentence-transformers', whatever the batch, in a handful of compiled shapes."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_models

import formax
from formax.text import embedding
from formax.text.embedding import Layout, SentenceEncoder, embed, pool, read_layout

DATA = Path(__file__).parent / "data" / "text"
WORDS = ["a", "the", "dog", "fox", "quick", "lazy", "parameter", "declared", "words", "pieces", "thoughts", "vow"]


def texts_of(*lengths: int) -> list[str]:
    """Texts of so many words."""
    return [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(n)) for start, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and the small WordPiece tokenizer."""
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 80, "initializer_range": 0.3}
    return text_models.tiny(tmp_path_factory.mktemp("tiny"), **changes)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(folder)


def put(folder: Path, **files: Any) -> None:
    """Writes JSON files below a folder; `__` in a name is a slash."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


# ------------------------------------------------------------------------------------------------- like the reference


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(text_models.minilm())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "minilm_embeddings.npz") as stored:
        return {key: stored[key] for key in stored.files}


def test_minilm_embeddings_are_those_of_sentence_transformers(
    minilm: SentenceEncoder, golden: dict[str, np.ndarray]
) -> None:
    texts = [str(text) for text in golden["texts"]]
    assert max(minilm.count_tokens(texts)) > minilm.max_length == 256
    got = minilm.encode(texts)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, golden["embeddings"], rtol=0, atol=1e-5)


def test_poolings_are_those_of_sentence_transformers(minilm: SentenceEncoder, golden: dict[str, np.ndarray]) -> None:
    texts = [str(text) for text in golden["texts"]][:6]
    everything = dataclasses.replace(minilm, pooling=embedding.POOLINGS, normalize=False).encode(texts)
    expected = np.concatenate([golden[f"pooled.{mode}"][:6] for mode in embedding.POOLINGS], axis=1)
    assert everything.shape == (6, 4 * 384)
    np.testing.assert_allclose(everything, expected, rtol=0, atol=2e-5)


# -------------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("left", [False, True])
def test_pooling_reads_real_tokens_alone(left: bool) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 5, 4)).astype(np.float32)
    lengths = (5, 3, 1)
    mask = np.zeros((3, 5), np.int32)
    rows = []
    for row, length in enumerate(lengths):
        kept = slice(5 - length, 5) if left else slice(0, length)
        mask[row, kept] = 1
        rows.append(hidden[row, kept])
    hidden[mask == 0] = np.nan  # whatever is there must not count
    expected = {
        "mean": [row.mean(0) for row in rows],
        "mean_sqrt_len_tokens": [row.sum(0) / np.sqrt(len(row)) for row in rows],
        "max": [row.max(0) for row in rows],
        "cls": [row[0] for row in rows],
    }
    for mode, values in expected.items():
        np.testing.assert_allclose(pool(jnp.asarray(hidden), jnp.asarray(mask), mode), values, rtol=1e-6)


def test_embed_is_a_pure_function_with_gradients(encoder: SentenceEncoder) -> None:
    batch = encoder.tokenizer(["the dog", "a fox"], padding=True, return_tensors="jax")

    def spread(model: Any) -> jax.Array:
        first, second = embed(model, dict(batch))
        return first @ second

    gradients = jax.jit(jax.grad(spread))(encoder.model)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))


# -------------------------------------------------------------------------------------------------------------- encode


def test_a_vector_does_not_depend_on_its_company(encoder: SentenceEncoder) -> None:
    texts = [*texts_of(70, 1, 33, 0, 9), "Ünïcödé ünd 東京", *texts_of(31)]
    together = encoder.encode(texts, batch_size=4)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    for row, text in enumerate(texts):
        alone = encoder.tokenizer([text], truncation=True, padding="max_length", max_length=64, return_tensors="np")
        hidden = np.asarray(encoder.model(**alone).last_hidden_state)[0, : alone["attention_mask"].sum()]
        mean = hidden.mean(0)
        np.testing.assert_allclose(together[row], mean / np.linalg.norm(mean), atol=2e-6)
        np.testing.assert_allclose(encoder.encode(text), together[row], atol=2e-6)


def test_texts_beyond_the_limit_are_cut(encoder: SentenceEncoder) -> None:
    assert encoder.max_length == 64  # the tokenizer's: less than the positions of the model
    long, longer = texts_of(62)[0], f"{texts_of(62)[0]} dog fox dog"
    np.testing.assert_allclose(encoder.encode(long), encoder.encode(longer), atol=1e-6)
    assert np.abs(encoder.encode(long) - encoder.encode(texts_of(60)[0])).max() > 1e-3


def test_normalisation_can_be_chosen(encoder: SentenceEncoder) -> None:
    plain = encoder.encode(["the dog", "a"], normalize=False)
    norms = np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(norms - 1).max() > 0.1
    np.testing.assert_allclose(encoder.encode(["the dog", "a"]), plain / norms, atol=1e-6)


def test_prompts_are_put_before_texts(encoder: SentenceEncoder) -> None:
    prompted = dataclasses.replace(encoder, prompts={"query": "the quick "}, default_prompt="my ")
    np.testing.assert_array_equal(prompted.encode(["dog"]), encoder.encode(["my dog"]))
    np.testing.assert_array_equal(prompted.encode(["dog"], prompt="the quick "), encoder.encode(["the quick dog"]))
    np.testing.assert_array_equal(prompted.encode(["dog"], prompt=""), encoder.encode(["dog"]))


def test_lower_case_is_applied_when_asked_for(encoder: SentenceEncoder) -> None:
    cased = formax.AutoTokenizer.from_pretrained(DATA / "bytelevel")
    lower = dataclasses.replace(encoder, tokenizer=cased, model=stand_in(400), lower_case=True)
    kept = dataclasses.replace(lower, lower_case=False)
    np.testing.assert_array_equal(lower.encode(["DOG"]), kept.encode(["dog"]))
    assert np.abs(kept.encode(["DOG"]) - kept.encode(["dog"])).max() > 1e-3
    assert lower.count_tokens(["DOG"]) == kept.count_tokens(["dog"])


def test_progress_is_told(encoder: SentenceEncoder) -> None:
    told: list[tuple[int, ...]] = []
    encoder.encode(texts_of(*range(1, 11)), batch_size=4, progress=lambda *at: told.append(at))
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_no_texts_give_no_vectors(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 24)


class Traces:
    """The shapes that a stand-in model was traced with: those that are compiled."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["traces"])
@dataclasses.dataclass(frozen=True)
class StandIn:
    """A model that looks tokens up in a table [V, 6]."""

    table: jax.Array
    traces: Traces

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(hidden_size=6, vocab_size=self.table.shape[0])

    def __call__(self, input_ids: jax.Array, **_: jax.Array) -> SimpleNamespace:
        self.traces.shapes.append(input_ids.shape)
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def stand_in(vocabulary: int = 221) -> StandIn:
    return StandIn(jax.random.normal(jax.random.key(1), (vocabulary, 6)), Traces())


def test_only_a_handful_of_shapes_is_compiled(encoder: SentenceEncoder) -> None:
    model = stand_in()
    counting = dataclasses.replace(encoder, model=model, max_length=200)
    assert counting.buckets() == (32, 64, 128, 200)
    rng = np.random.default_rng(0)
    for total in (97, 300, 64, 200):
        counting.encode(texts_of(*rng.integers(0, 260, total)), batch_size=16)
    assert sorted(model.traces.shapes) == [(16, 32), (16, 64), (16, 128), (16, 200)]


def test_one_text_is_not_padded_to_a_whole_batch(encoder: SentenceEncoder) -> None:
    model = stand_in()
    dataclasses.replace(encoder, model=model).encode("the dog")
    assert model.traces.shapes == [(1, 32)]


def test_a_window_of_texts_is_tokenized_at_a_time(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_WINDOW", 8)
    texts = texts_of(*range(0, 60, 2))
    windowed = encoder.encode(texts, batch_size=4)
    monkeypatch.undo()
    np.testing.assert_allclose(windowed, encoder.encode(texts, batch_size=4), atol=2e-6)


# ------------------------------------------------------------------------------------------------------------ the files


def test_a_folder_of_any_model_has_mean_pooling(folder: Path) -> None:
    assert read_layout(folder) == Layout(folder)


def test_the_layout_of_sentence_transformers_is_read(tmp_path: Path) -> None:
    put(
        tmp_path,
        modules=MODULES,
        sentence_bert_config={"max_seq_length": 12, "do_lower_case": True},
        **{"1_Pooling__config": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
        config_sentence_transformers={"prompts": {"query": "q: ", "document": None}, "default_prompt_name": "query"},
    )
    expected = Layout(tmp_path, ("cls", "mean"), True, 12, True, {"query": "q: ", "document": ""}, "q: ")
    assert read_layout(tmp_path) == expected
    # as version 6 writes it, and without normalisation
    newer = [{"path": "0_Transformer", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    newer += [{"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}]
    put(tmp_path, modules=newer, **{"1_Pooling__config": {"embedding_dimension": 4, "pooling_mode": "max"}})
    layout = read_layout(tmp_path)
    assert (layout.transformer, layout.pooling, layout.normalize) == (tmp_path / "0_Transformer", ("max",), False)
    assert layout.max_seq_length is None


def test_the_layout_decides_what_encode_gives(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    put(
        copy,
        modules=MODULES[:2],
        sentence_bert_config={"max_seq_length": 7},
        **{"1_Pooling__config": {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}},
    )
    opened = SentenceEncoder.from_pretrained(copy)
    assert (opened.max_length, opened.room) == (7, 5)
    ids = opened.tokenizer("the quick fox", return_tensors="np")
    expected = np.asarray(opened.model(**ids).last_hidden_state)[0, 0]
    np.testing.assert_allclose(opened.encode("the quick fox"), expected, atol=2e-6)
    np.testing.assert_allclose(opened.encode(texts_of(5)), opened.encode(texts_of(9)), atol=1e-6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": "[", "1_Pooling__config": {}}, r"modules\.json is not valid JSON"),
        ({"modules": "{}", "1_Pooling__config": {}}, r"modules\.json holds dict, not a list"),
        ({"modules": [3]}, r"module 0 is 3, not an object"),
        ({"modules": MODULES}, r"1_Pooling/config\.json is missing, and modules\.json names its folder"),
        ({"modules": []}, "chains no modules; formax has Transformer, Pooling"),
        (
            {"modules": [*MODULES[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]},
            "chains Transformer, Pooling, Dense; formax has",
        ),
        (
            {"modules": [MODULES[0], MODULES[1] | {"path": "../outside"}]},
            r"the path '\.\./outside' leads out of the folder",
        ),
        ({"modules": [MODULES[0], MODULES[1] | {"path": "/etc"}]}, "the path '/etc' leads out of the folder"),
        (
            {"modules": MODULES, "1_Pooling__config": {"pooling_mode_lasttoken": True}},
            r"1_Pooling/config\.json: pools by \['lasttoken'\]; formax has cls, max, mean",
        ),
        ({"modules": MODULES, "1_Pooling__config": {"pooling_mode": "attention"}}, "pools by .*'attention'"),
        (
            {"modules": MODULES, "1_Pooling__config": {}, "sentence_bert_config": {"max_seq_length": "long"}},
            "'max_seq_length' is 'long'",
        ),
        (
            {
                "modules": MODULES,
                "1_Pooling__config": {"include_prompt": False},
                "config_sentence_transformers": {"prompts": {"query": "q"}},
            },
            "'include_prompt' is false",
        ),
        (
            {"modules": MODULES, "1_Pooling__config": {}, "config_sentence_transformers": {"prompts": ["q"]}},
            r"'prompts' is \['q'\]",
        ),
        (
            {
                "modules": MODULES,
                "1_Pooling__config": {},
                "config_sentence_transformers": {"prompts": {"a": "b"}, "default_prompt_name": "c"},
            },
            "'default_prompt_name' is 'c', and 'prompts' has a",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    put(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        read_layout(tmp_path)


def test_misuse_is_refused(encoder: SentenceEncoder) -> None:
    with pytest.raises(TypeError, match="text 1 is int, not a string"):
        encoder.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size=0"):
        encoder.encode(["a"], batch_size=0)
    with pytest.raises(ValueError, match=r"the id .* and the model has 20 rows: they do not belong together"):
        dataclasses.replace(encoder, model=stand_in(20)).encode(["the quick brown fox"])


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere does not exist"):
        SentenceEncoder.from_pretrained(tmp_path / "nowhere")
