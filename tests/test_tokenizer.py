"""Tokenizers give what the reference gives, leave no trace of a call, and save what they read."""

import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_models
import tokenizers

import formax
from formax.text import tokenizer_classes
from formax.text.batch_encoding import BatchEncoding, CharSpan, TokenSpan
from formax.text.tokenizer import UNLIMITED, Tokenizer

DATA = Path(__file__).parent / "data" / "text"
GOLDEN = json.loads((DATA / "tokenizers.json").read_text(encoding="utf-8"))
NAMES = ("wordpiece", "bytelevel", "minilm")
SPACES = "  two  spaces,   and a tab\tand a\nnew line \r\n "


def folder_of(name: str) -> Path:
    return text_models.minilm() if name == "minilm" else DATA / name


def load(name: str) -> Tokenizer:
    return formax.AutoTokenizer.from_pretrained(folder_of(name))


@pytest.fixture(params=NAMES)
def named(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    return request.param, load(request.param)


@pytest.fixture
def wordpiece() -> Tokenizer:
    return load("wordpiece")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the WordPiece tokenizer to change."""
    return Path(shutil.copytree(DATA / "wordpiece", tmp_path / "copied"))


def plain(batch: dict[str, Any]) -> Any:
    """A batch in the form of the goldens."""
    return json.loads(
        json.dumps(
            {
                key: {"dtype": str(value.dtype), "rows": value.tolist()} if hasattr(value, "dtype") else value
                for key, value in batch.items()
            }
        )
    )


# ------------------------------------------------------------------------------------------------- like the reference


@pytest.mark.filterwarnings("ignore:a text has:UserWarning", "ignore:no max_length is given:UserWarning")
def test_calls_give_what_the_reference_gives(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    assert len(GOLDEN[name]["calls"]) > 50
    for case in GOLDEN[name]["calls"]:
        if case["expected"] is None:
            with pytest.raises(ValueError, match="cannot bring every text to max_length"):
                tokenizer(**case["call"])
        else:
            batch = tokenizer(**case["call"])
            assert plain(batch) == case["expected"], case["call"]
            assert list(batch) == list(case["expected"]), case["call"]


def test_attributes_are_those_of_the_reference(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    rest = GOLDEN[name]["rest"]
    assert {key: getattr(tokenizer, key) for key in rest["attributes"]} == rest["attributes"]
    assert len(tokenizer) == rest["length"] == max(tokenizer.get_vocab().values()) + 1
    assert sorted(tokenizer.model_input_names) == rest["model_input_names"]
    counts = [tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)]
    assert counts == rest["num_special_tokens_to_add"]


@pytest.mark.filterwarnings("ignore:a text has:UserWarning")
def test_decoding_and_conversion_are_those_of_the_reference(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    rest = GOLDEN[name]["rest"]
    for case in rest["decode"]:
        assert tokenizer.decode(tokenizer.encode(case["text"]), case["skip"], case["clean"]) == case["expected"]
    assert [[text, tokenizer.tokenize(text)] for text, _ in rest["tokenize"]] == rest["tokenize"]
    convert = rest["convert"]
    ids = tokenizer("A parameter is declared once.")["input_ids"]
    assert tokenizer.convert_tokens_to_ids(convert["tokens"]) == convert["ids"]
    assert tokenizer.convert_ids_to_tokens([*ids, 10**6]) == convert["back"]
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == convert["back_without_special"]


def test_pad_is_that_of_the_reference(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    for case in GOLDEN[name]["rest"]["pad"]:
        assert plain(tokenizer.pad(case["inputs"], **case["options"])) == case["expected"], case["options"]


def test_maps_between_characters_words_and_tokens_are_those_of_the_reference(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    maps = GOLDEN[name]["rest"]["maps"]
    batch = tokenizer([SPACES, "x"], ["The dog", "y"])
    tokens = range(len(batch.tokens(0)))
    assert [batch.word_ids(row) for row in (0, 1)] == maps["word_ids"]
    assert [batch.sequence_ids(row) for row in (0, 1)] == maps["sequence_ids"]
    assert [batch.tokens(row) for row in (0, 1)] == maps["tokens"]
    assert [batch.char_to_token(0, char) for char in range(len(SPACES))] == maps["char_to_token"]
    assert [batch.char_to_token(0, char, 1) for char in range(7)] == maps["char_to_token_second"]
    assert json.loads(json.dumps([batch.token_to_chars(token) for token in tokens])) == maps["token_to_chars"]
    assert [batch.token_to_word(0, token) for token in tokens] == maps["token_to_word"]
    assert json.loads(json.dumps([batch.word_to_tokens(0, word) for word in range(4)])) == maps["word_to_tokens"]


def test_the_table_of_classes_is_that_of_the_reference() -> None:
    golden = json.loads((DATA / "tokenizer_classes.json").read_text())
    known = tokenizer_classes.CLASSES.keys() | tokenizer_classes.NOT_IN_TOKENIZER_JSON.keys()
    for name, expected in golden["classes"].items():
        assert name in known
        if name in tokenizer_classes.CLASSES:
            entry = tokenizer_classes.CLASSES[name]
            assert dict(entry.special_tokens) == expected["special_tokens"], name
            assert list(entry.input_names) == expected["input_names"], name
            assert entry.padding_side == expected["padding_side"], name
    for model_type, name in golden["class_of_model_type"].items():
        if name in tokenizer_classes.CLASSES:
            assert tokenizer_classes.CLASS_OF_MODEL_TYPE[model_type] == name


# -------------------------------------------------------------------------------------------------------- the results


def test_a_batch_is_a_dictionary_with_attributes(wordpiece: Tokenizer) -> None:
    batch = wordpiece(["The dog", "a"], padding=True, return_tensors="np")
    assert isinstance(batch, dict)
    assert {**batch}.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert batch.input_ids is batch["input_ids"]
    assert batch[1].tokens == batch.tokens(1)
    assert batch.n_sequences == 1
    assert batch.token_to_chars(0, 1) == CharSpan(0, 3)
    assert batch.word_to_tokens(0, 1) == TokenSpan(2, 3)
    with pytest.raises(AttributeError, match="has no 'labels'; it has input_ids"):
        _ = batch.labels
    copy = pickle.loads(pickle.dumps(batch))
    assert copy.tokens(0) == batch.tokens(0)
    assert copy["input_ids"].tolist() == batch["input_ids"].tolist()


def test_a_batch_that_was_not_made_from_text_says_so(wordpiece: Tokenizer) -> None:
    padded = wordpiece.pad({"input_ids": [[2, 3], [2]]})
    with pytest.raises(ValueError, match="only a batch that was made from text"):
        padded.word_ids()
    with pytest.raises(KeyError, match="made from text"):
        padded[0]
    assert BatchEncoding({"a": 1}).n_sequences is None


def test_jax_arrays_are_int32(wordpiece: Tokenizer) -> None:
    batch = wordpiece(["The dog", "a"], padding=True, return_tensors="jax")
    expected = wordpiece(["The dog", "a"], padding=True)
    assert {key: value.dtype.name for key, value in batch.items()} == dict.fromkeys(expected, "int32")
    assert {key: value.tolist() for key, value in batch.items()} == {**expected}


def test_numpy_and_jax_ids_are_decoded(wordpiece: Tokenizer) -> None:
    batch = wordpiece(["the dog", "once"], padding=True, return_tensors="jax")
    for ids in (batch.input_ids, np.asarray(batch.input_ids), batch.input_ids.tolist(), list(batch.input_ids)):
        assert wordpiece.batch_decode(ids, skip_special_tokens=True) == ["the dog", "once"]
    first = np.asarray(batch.input_ids)[0]
    assert wordpiece.decode(first, skip_special_tokens=True) == "the dog"
    assert wordpiece.decode(first[1]) == "the"
    assert wordpiece.convert_ids_to_tokens(first[1]) == "the"
    assert wordpiece.convert_ids_to_tokens(first)[0] == "[CLS]"


def test_padding_arrays_gives_arrays(wordpiece: Tokenizer) -> None:
    padded = wordpiece.pad([{"input_ids": np.array([2, 3, 4])}, {"input_ids": np.array([2])}])
    assert padded["input_ids"].tolist() == [[2, 3, 4], [2, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_an_empty_batch_is_empty(wordpiece: Tokenizer) -> None:
    assert wordpiece([]) == {"input_ids": [], "token_type_ids": [], "attention_mask": []}


def test_tokens_are_counted_without_special_ones_and_without_a_limit(wordpiece: Tokenizer) -> None:
    assert wordpiece.count_tokens(["", "the dog", "the dog " * 500]) == [0, 2, 1000]


# ------------------------------------------------------------------------------------------------------- statelessness


def test_a_call_leaves_no_trace(named: tuple[str, Tokenizer]) -> None:
    _, tokenizer = named
    before = tokenizer._backend.to_str(), tokenizer("The dog judges my vow!")
    tokenizer(["a", "the dog " * 9], padding="max_length", truncation=True, max_length=8, padding_side="left")
    assert (tokenizer._backend.to_str(), tokenizer("The dog judges my vow!")) == before
    assert tokenizer._backend.padding is None
    assert tokenizer._backend.truncation is None


def test_threads_with_different_shapes_do_not_disturb_each_other(wordpiece: Tokenizer) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 2
    expected = {length: wordpiece(text, truncation=True, max_length=length)["input_ids"] for length in range(4, 12)}
    wrong: list[int] = []

    def work(length: int) -> None:
        for _ in range(60):
            padded = wordpiece([text, "a"], padding="max_length", truncation=True, max_length=length)["input_ids"]
            if padded[0] != expected[length] or len(padded[1]) != length:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_tokenizer_can_be_pickled(wordpiece: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(wordpiece))
    assert copy("The [EXTRA] dog", padding=True) == wordpiece("The [EXTRA] dog", padding=True)


# -------------------------------------------------------------------------------------------------------------- saving


def test_an_unchanged_tokenizer_is_saved_byte_for_byte(wordpiece: Tokenizer, tmp_path: Path) -> None:
    wordpiece(["a", "b c"], padding="max_length", truncation=True, max_length=4)
    paths = wordpiece.save_pretrained(tmp_path / "new" / "folder")
    names = {Path(path).name for path in paths}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names
    for path in paths:
        assert Path(path).read_bytes() == (DATA / "wordpiece" / Path(path).name).read_bytes()


def test_a_tokenizer_that_named_no_class_is_saved_with_it(tmp_path: Path) -> None:
    load("bytelevel").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "RobertaTokenizer"
    again = formax.AutoTokenizer.from_pretrained(tmp_path)
    assert again("The dog") == load("bytelevel")("The dog")
    assert again.model_input_names == ("input_ids", "attention_mask")


def test_changes_are_saved(tmp_path: Path) -> None:
    tokenizer = load("bytelevel")
    assert tokenizer.model_max_length == UNLIMITED
    assert "[NEW]" not in tokenizer.tokenize("declared [NEW]")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.cls_token_id = tokenizer.mask_token_id
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 30
    assert tokenizer.add_tokens(["declared", "declared", "[NEW]"]) == 2
    assert tokenizer.add_tokens("dog") == 1
    assert tokenizer.tokenize("declared [NEW]")[::2] == ["declared", "[NEW]"]
    assert tokenizer.add_special_tokens({"sep_token": "[SEP]", "additional_special_tokens": ["[X]", "[Y]"]}) == 3
    tokenizer.save_pretrained(tmp_path)
    again = formax.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A parameter is declared [NEW] once [SEP] [X]", "a"]
    assert again(texts, padding=True) == tokenizer(texts, padding=True)
    assert again.tokenize(texts[0]).count("declared") == 1
    assert (again.pad_token, again.padding_side, again.model_max_length, len(again)) == (
        "</s>",
        "left",
        30,
        len(load("bytelevel")) + 6,
    )
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.cls_token == "<mask>"


def test_padding_and_truncation_in_the_file_survive_added_tokens(wordpiece: Tokenizer, tmp_path: Path) -> None:
    wordpiece.add_tokens("[NEW]")
    wordpiece.save_pretrained(tmp_path)
    listed = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    assert {index: token["content"] for index, token in listed.items()}[str(len(wordpiece) - 1)] == "[NEW]"
    assert (len(listed), listed["0"]["special"]) == (7, True)
    stored, new = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) for folder in (DATA / "wordpiece", tmp_path)
    )
    assert (new["padding"], new["truncation"]) == (stored["padding"], stored["truncation"])
    assert new["model"] == stored["model"]


def test_saving_over_a_file_is_refused(wordpiece: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: is a file"):
        wordpiece.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_folder_without_tokenizer_json_says_what_is_there(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json.*there are tokenizer_config.*vocab\.txt"):
        formax.AutoTokenizer.from_pretrained(copied)
    for path in copied.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no tokenizer file at all"):
        formax.AutoTokenizer.from_pretrained(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "WordPiece"}}'])
def test_a_broken_tokenizer_json_is_named(copied: Path, content: bytes) -> None:
    (copied / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"copied/tokenizer\.json cannot be read: "):
        formax.AutoTokenizer.from_pretrained(copied)


@pytest.mark.parametrize("cut", [10, 1000, 3000])
def test_a_truncated_tokenizer_json_is_named(copied: Path, cut: int) -> None:
    content = (copied / "tokenizer.json").read_bytes()
    (copied / "tokenizer.json").write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        formax.AutoTokenizer.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON: Expecting"),
        ("tokenizer_config.json", "\udcff", r"tokenizer_config\.json is not valid JSON: .*utf-8"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json holds list"),
        ("tokenizer_config.json", '{"pad_token": 3}', r"'pad_token' has 3, not a token"),
        (
            "tokenizer_config.json",
            '{"additional_special_tokens": [{}]}',
            r"'additional_special_tokens' has {}, not a token",
        ),
        ("tokenizer_config.json", '{"model_max_length": "long"}', r"'model_max_length' is 'long'"),
        ("tokenizer_config.json", '{"padding_side": "up"}', r"'padding_side' is 'up'; use 'right' or 'left'"),
        ("tokenizer_config.json", '{"tokenizer_class": "RoFormerTokenizerFast"}', "no RoFormerTokenizer: .*jieba"),
        ("config.json", "nonsense", r"config\.json is not valid JSON"),
    ],
)
def test_a_broken_configuration_is_named(copied: Path, name: str, content: str, message: str) -> None:
    (copied / "special_tokens_map.json").unlink()
    (copied / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        formax.AutoTokenizer.from_pretrained(copied)


def test_a_wrong_special_token_in_the_older_file_is_named(copied: Path) -> None:
    (copied / "tokenizer_config.json").unlink()
    (copied / "special_tokens_map.json").write_text('{"sep_token": ["[SEP]"]}')
    with pytest.raises(ValueError, match=r"special_tokens_map\.json\): 'sep_token' has \['\[SEP\]'\]"):
        formax.AutoTokenizer.from_pretrained(copied)


def test_padding_without_a_padding_token_is_refused(copied: Path) -> None:
    config = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    tokenizer = formax.AutoTokenizer.from_pretrained(copied)
    assert tokenizer.pad_token_id is None
    for call in (lambda: tokenizer(["a"], padding=True), lambda: tokenizer.pad({"input_ids": [[1], [1, 2]]})):
        with pytest.raises(ValueError, match=r"has no padding token; choose one .*pad_token = tokenizer\.eos_token"):
            call()
    tokenizer.pad_token = "[UNK]"
    assert tokenizer(["a", "the dog"], padding=True)["input_ids"][0][-1] == tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "longest"}, "truncation='longest': use True, False, 'longest_first', 'only_first'"),
        ({"padding": "max"}, "padding='max': use True, False, 'longest', 'max_length'"),
        ({"padding": True, "padding_side": "top"}, "padding_side='top'"),
        ({"return_tensors": "pt"}, "return_tensors='pt': use 'np', 'jax' or None"),
        ({"truncation": True, "max_length": 1}, "max_length=1 has no room: the special tokens alone take 2"),
        ({"return_tensors": "np"}, "'input_ids' has rows of 3 to 7 tokens, which make no array: pass padding=True"),
        (
            {"padding": True, "truncation": True, "max_length": 5, "pad_to_multiple_of": 4},
            "max_length=5 is not a multiple of pad_to_multiple_of=4",
        ),
        ({"truncation": True, "max_length": 6, "stride": 4}, "stride=4 leaves nothing new .* room for 4 tokens"),
    ],
)
def test_options_that_mean_nothing_are_refused(wordpiece: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wordpiece(["a", "the dog is lazy."], **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": None}, TypeError, "text is NoneType; give a text or a list of texts"),
        ({"text": ["a", 3]}, TypeError, "text 1 holds int"),
        ({"text": ["a", None]}, TypeError, "text 1 holds NoneType"),
        ({"text": ["a", "b"], "text_pair": ["c"]}, ValueError, "as many texts as text, 2, and has 1 texts"),
        ({"text": ["a", "b"], "text_pair": "c"}, ValueError, "as many texts as text, 2, and has one string"),
        ({"text": "a b", "is_split_into_words": True}, TypeError, "takes lists of words"),
        ({"text": ["ok", "x\ud800"]}, ValueError, "text 1 is not valid Unicode: character 1 is half"),
    ],
)
def test_what_is_no_text_is_refused(
    wordpiece: Tokenizer, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        wordpiece(**call)


def test_other_misuse_is_refused(wordpiece: Tokenizer) -> None:
    with pytest.raises(TypeError, match="encode takes one text"):
        wordpiece.encode(["a", "b"])
    with pytest.raises(ValueError, match="no token has the id -100"):
        wordpiece.decode([5, -100])
    with pytest.raises(ValueError, match="batch_decode takes a batch"):
        wordpiece.decode([[5], [6]])
    with pytest.raises(ValueError, match="no 'input_ids' to pad; there is labels"):
        wordpiece.pad({"labels": [1]})
    with pytest.raises(ValueError, match="differ in batch size"):
        wordpiece.pad({"input_ids": [[1], [2]], "labels": [1]})
    with pytest.raises(ValueError, match=r"'\[FOO\]' is not in the vocabulary; add it"):
        wordpiece.pad_token = "[FOO]"
    with pytest.raises(ValueError, match="no special token 'foo_token'"):
        wordpiece.add_special_tokens({"foo_token": "[FOO]"})


def test_a_stride_that_leaves_no_room_beside_the_other_text_is_refused(wordpiece: Tokenizer) -> None:
    long = "the lazy dog " * 20
    with pytest.raises(ValueError, match="'only_second' cannot bring every text to max_length=30 with stride=20"):
        wordpiece("the lazy dog " * 3, long, truncation="only_second", max_length=30, stride=20)
    assert len(wordpiece("dog", long, truncation="only_second", max_length=30, stride=20)["input_ids"]) == 30


def test_warnings_name_what_would_be_right(wordpiece: Tokenizer) -> None:
    with pytest.warns(UserWarning, match=r"a text has 102 tokens and the model takes 64; pass truncation=True"):
        wordpiece("dog " * 100)
    with pytest.warns(UserWarning, match="max_length does nothing when padding=True"):
        wordpiece("dog", padding=True, max_length=4)
    wordpiece("dog " * 100, verbose=False)
    with pytest.warns(UserWarning, match="declares no model_max_length"):
        load("bytelevel")("dog", truncation=True)


def test_tokenizer_takes_the_library_s_files_alone() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    assert tokenizer("b a b") == {"input_ids": [1, 0, 1], "token_type_ids": [0, 0, 0], "attention_mask": [1, 1, 1]}
    assert tokenizer.pad_token is None
