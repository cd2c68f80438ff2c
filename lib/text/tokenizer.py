"""Tokenizers: text in, ids out, over the `tokenizers` library's tokenizer.json.

Arguments, defaults and results are those of the fast tokenizers of transformers 4, so that code that moves here keeps
its ids. A call never changes the tokenizer: padding and truncation belong to the call, which makes one tokenizer safe
to share between threads.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

from formax.text.batch_encoding import BatchEncoding
from formax.text.files import parse_json
from formax.text.own_classes import OwnClasses
from formax.text.tokenizer_classes import (
    BERT_NORMALIZER,
    CLASS_OF_MODEL_TYPE,
    CLASSES,
    NOT_IN_TOKENIZER_JSON,
    PLAIN,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding
    from tokenizers import Tokenizer as Backend

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
# The files of a tokenizer. The first three are read; the rest is kept so that a save is complete.
FILES = (
    TOKENIZER,
    CONFIG,
    SPECIAL_MAP,
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)
# What a download of a tokenizer fetches; config.json tells the class of a tokenizer that does not say its own.
HUB_PATTERNS = (*FILES, "config.json")

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SIDES = ("right", "left")
TRUNCATIONS = ("longest_first", "only_first", "only_second")
# The length of a model that has no limit, as transformers writes it.
UNLIMITED = int(1e30)
_NO_LIMIT_ABOVE = int(1e20)
# Spaces that `clean_up_tokenization_spaces` takes out, in this order.
_SPACES = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class _Shape:
    """How one call truncates and pads: the key of a configured backend."""

    truncation: str | None = None
    max_length: int | None = None
    stride: int = 0
    truncation_side: str = "right"
    padding: str | None = None
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"
    pad_token: str = ""
    pad_id: int = 0


class _SpecialToken:
    """A property that holds the text of a special token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, tokenizer: Tokenizer, owner: type) -> str | None: ...
    def __get__(self, tokenizer: Tokenizer | None, owner: type) -> Self | str | None:
        return self if tokenizer is None else tokenizer._special.get(self.name)

    def __set__(self, tokenizer: Tokenizer, token: str | None) -> None:
        tokenizer._set_special(self.name, token)


class _SpecialTokenId:
    """A property that holds the id of a special token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, tokenizer: Tokenizer, owner: type) -> int | None: ...
    def __get__(self, tokenizer: Tokenizer | None, owner: type) -> Self | int | None:
        if tokenizer is None:
            return self
        token = tokenizer._special.get(self.name)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: Tokenizer, index: int | None) -> None:
        tokenizer._set_special(self.name, None if index is None else tokenizer.convert_ids_to_tokens(index))


class Tokenizer:
    """Turns text into ids and back.

    Attributes:
        name_or_path: where it was read, for messages.
        model_input_names: what a call returns unless asked otherwise.
        model_max_length: the longest input of the model, in tokens; `UNLIMITED` when the checkpoint does not say.
        padding_side: "right" or "left".
        truncation_side: "right" or "left".
        clean_up_tokenization_spaces: whether `decode` takes out spaces before punctuation.
        additional_special_tokens: special tokens without a name of their own.
        pad_token: text of the padding token, or None; likewise `bos_token`, `eos_token`, `unk_token`, `sep_token`,
            `cls_token`, `mask_token`. Assignable, to a token of the vocabulary.
        pad_token_id: its id, or None; likewise for the others.
    """

    bos_token = _SpecialToken()
    eos_token = _SpecialToken()
    unk_token = _SpecialToken()
    sep_token = _SpecialToken()
    pad_token = _SpecialToken()
    cls_token = _SpecialToken()
    mask_token = _SpecialToken()
    bos_token_id = _SpecialTokenId()
    eos_token_id = _SpecialTokenId()
    unk_token_id = _SpecialTokenId()
    sep_token_id = _SpecialTokenId()
    pad_token_id = _SpecialTokenId()
    cls_token_id = _SpecialTokenId()
    mask_token_id = _SpecialTokenId()

    # ------------------------------------------------------------------------------------------------ reading, writing

    def __init__(self, files: Mapping[str, bytes], *, name_or_path: str = "tokenizer", class_name: str = "") -> None:
        """Makes a tokenizer of the contents of its files.

        Args:
            files: name -> content; needs "tokenizer.json".
            name_or_path: where they come from, for messages.
            class_name: the class of transformers it belongs to, where tokenizer_config.json does not say.

        Raises:
            ValueError: a file that cannot be understood.
        """
        self.name_or_path = name_or_path
        self._files = dict(files)
        config = self._read_json(CONFIG)
        self._class_name = config.get("tokenizer_class") or class_name
        plain_name = str(self._class_name).removesuffix("Fast")
        if plain_name in NOT_IN_TOKENIZER_JSON:
            reason = NOT_IN_TOKENIZER_JSON[plain_name]
            raise ValueError(f"{name_or_path}: formax has no {plain_name}: {reason}, which {TOKENIZER} does not hold")
        defaults = CLASSES.get(plain_name, PLAIN)

        self._backend = self._read_backend()
        stored_padding, stored_truncation = self._backend.padding or {}, self._backend.truncation or {}
        self._backend.no_padding()
        self._backend.no_truncation()
        self._stored = (stored_padding, stored_truncation)

        tokens = self._read_special_tokens(config, dict(defaults.special_tokens), stored_padding.get("pad_token"))
        self._special: dict[str, str] = {key: token for key, token in tokens.items() if isinstance(token, str)}
        self.additional_special_tokens: list[str] = tokens["additional_special_tokens"]
        self.model_input_names = tuple(config.get("model_input_names") or defaults.input_names)
        self.padding_side = str(config.get("padding_side") or stored_padding.get("direction") or defaults.padding_side)
        self.truncation_side = str(config.get("truncation_side") or stored_truncation.get("direction") or "right")
        self.model_max_length = self._read_max_length(config)
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", False))
        self._backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        for key in ("padding_side", "truncation_side"):
            if getattr(self, key) not in SIDES:
                raise ValueError(f"{name_or_path}/{CONFIG}: {key!r} is {getattr(self, key)!r}; use 'right' or 'left'")

        _overrule_normalizer(self._backend, config, defaults.normalizer_switches)
        _overrule_prefix_space(self._backend, config)
        self._add_declared_tokens(config)
        self._loaded_added = len(self._backend.get_added_tokens_decoder())
        self._loaded = self._settings()
        self._configured = lru_cache(maxsize=32)(self._configure)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_fast: bool = True,
        trust_remote_code: bool | None = None,
    ) -> Tokenizer:
        """Reads the tokenizer of a folder or of a repository of the hub.

        Args:
            path_or_repo: a folder, or a repository like "sentence-transformers/all-MiniLM-L6-v2".
            revision: branch, tag or commit of a repository.
            cache_dir: where downloads are kept.
            local_files_only: never use the network.
            token: for repositories that are not public.
            use_fast: must be true: the slow tokenizers of transformers are not here.
            trust_remote_code: must not be true: no code out of a checkpoint is run.

        Raises:
            FileNotFoundError: there is no such folder, or no tokenizer.json in it.
            ValueError: a file that cannot be understood.
        """
        from formax import hub

        hub.refuse_code(trust_remote_code)
        if not use_fast:
            raise ValueError("use_fast=False: formax has the fast tokenizers alone, those of tokenizer.json")
        folder = hub.snapshot(
            path_or_repo,
            HUB_PATTERNS,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if TOKENIZER not in files:
            there = f"there are {', '.join(files)}" if files else "there is no tokenizer file at all"
            raise FileNotFoundError(
                f"{folder} has no {TOKENIZER}, the one format that formax reads; {there}. The fast tokenizer of"
                f" transformers makes one of older files: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return cls(files, name_or_path=str(path_or_repo), class_name=_class_from_model_config(folder))

    def save_pretrained(self, save_directory: str | Path) -> tuple[str, ...]:
        """Writes the files that were read, with what was changed since, and returns their paths.

        An unchanged tokenizer is written byte for byte, so transformers and this class open it as before.

        Raises:
            CheckpointError: it cannot be written; then nothing in the folder was changed.
        """
        from formax.conversion.atomic import Staging

        folder = Path(save_directory)
        contents = self._contents()
        with Staging(folder) as staging:
            for name, content in contents.items():
                with staging.open(name) as write:
                    write(content)
            staging.commit([("place", name) for name in contents])
        return tuple(str(folder / name) for name in contents)

    def _contents(self) -> dict[str, bytes]:
        """What each file of a save holds."""
        contents = dict(self._files)
        changed = {key: value for key, value in self._settings().items() if self._loaded[key] != value}
        config = self._read_json(CONFIG)
        if self._class_name and not config.get("tokenizer_class"):
            changed["tokenizer_class"] = self._class_name
        added = sorted(self._backend.get_added_tokens_decoder().items())
        if len(added) != self._loaded_added and "added_tokens_decoder" in config:
            changed["added_tokens_decoder"] = {str(index): token.__getstate__() for index, token in added}
        if changed:
            contents[CONFIG] = _json_bytes(config | changed)
            special = {key: value for key, value in changed.items() if key.endswith(("_token", "_tokens"))}
            if special and SPECIAL_MAP in contents:
                contents[SPECIAL_MAP] = _json_bytes(self._read_json(SPECIAL_MAP) | special)
        if len(added) != self._loaded_added:
            contents[TOKENIZER] = self._extended_json()
        return contents

    def _extended_json(self) -> bytes:
        """tokenizer.json with the tokens added since it was read, and the padding and truncation it had."""
        padding, truncation = self._stored
        backend = self._clone()
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)
        return backend.to_str(pretty=True).encode()

    def _settings(self) -> dict[str, Any]:
        """Whatever can be assigned and goes into tokenizer_config.json."""
        return {
            **{name: self._special.get(name) for name in SPECIAL_TOKENS},
            "additional_special_tokens": list(self.additional_special_tokens),
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        }

    def _read_json(self, name: str) -> dict[str, Any]:
        """The object in one of the files, empty when there is no such file."""
        found: dict[str, Any] = parse_json(self._files.get(name, b"{}"), f"{self.name_or_path}/{name}")
        return found

    def _read_backend(self) -> Backend:
        """The `tokenizers` object of tokenizer.json."""
        from tokenizers import Tokenizer as Backend

        try:
            return Backend.from_buffer(self._files[TOKENIZER])
        # The library raises plain `Exception` or `ValueError`, whatever is wrong.
        except Exception as error:
            raise ValueError(f"{self.name_or_path}/{TOKENIZER} cannot be read: {error}") from error

    def _read_special_tokens(
        self, config: dict[str, Any], defaults: dict[str, str], padding_token: str | None
    ) -> dict[str, Any]:
        """Special tokens by name, from the places that can declare them; the later one wins."""
        tokens: dict[str, Any] = ({"pad_token": padding_token} if padding_token else {}) | defaults
        declared = dict(config)
        # A configuration that lists its added tokens was written whole: the older file beside it counts no more.
        if "added_tokens_decoder" not in config:
            declared |= self._read_json(SPECIAL_MAP)
        for key in SPECIAL_TOKENS:
            if key in declared:
                tokens[key] = None if declared[key] is None else self._token_text(key, declared[key])
        more = declared.get("additional_special_tokens") or []
        # transformers 5 writes a list where version 4 wrote names: tokens.
        extra = declared.get("extra_special_tokens") or []
        more = [*more, *(extra.values() if isinstance(extra, dict) else extra)]
        texts = [self._token_text("additional_special_tokens", token) for token in more]
        tokens["additional_special_tokens"] = list(dict.fromkeys(texts))
        return tokens

    def _token_text(self, key: str, value: Any) -> str:
        """The text of a token that is stored as a string or as an object with a "content"."""
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(
                f"{self.name_or_path}/{CONFIG} (or {SPECIAL_MAP}): {key!r} has {value!r}, not a token: use a string or"
                ' an object like {"content": "[PAD]"}'
            )
        return text

    def _read_max_length(self, config: dict[str, Any]) -> int:
        value = config.get("model_max_length") or config.get("max_len") or UNLIMITED
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
            raise ValueError(f"{self.name_or_path}/{CONFIG}: 'model_max_length' is {value!r}, not a number of tokens")
        return int(value)

    def _add_declared_tokens(self, config: dict[str, Any]) -> None:
        """Adds tokens that the configuration declares and tokenizer.json lacks, in the order of their ids."""
        from tokenizers import AddedToken

        declared = config.get("added_tokens_decoder") or {}
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        new: list[AddedToken] = []
        for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
            text = self._token_text("added_tokens_decoder", entry)
            new.append(AddedToken(text, **{flag: bool(entry[flag]) for flag in flags if flag in entry}))
        new += [AddedToken(text, special=True) for text in self.all_special_tokens]
        for token in new:
            if token.content not in known:
                self._backend.add_tokens([token])
                known.add(token.content)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the cache of configured backends, which another process makes anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_configured"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._configured = lru_cache(maxsize=32)(self._configure)

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.name_or_path!r}, vocab_size={self.vocab_size}, model_max_length={self.model_max_length},"
            f" padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )

    # ------------------------------------------------------------------------------------------------- text to numbers

    def __call__(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[Any] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encodes a text, a pair of texts, or a batch of either.

        Args:
            text: a text or a list of texts; with `is_split_into_words` a list of words or a list of such lists.
            text_pair: the second texts, of the same form.
            add_special_tokens: put [CLS], [SEP] and the like around.
            padding: True or "longest": to the longest of the batch; "max_length": to `max_length` or else
                `model_max_length`; False: not at all.
            truncation: True or "longest_first": shorten the longer text of a pair first; "only_first",
                "only_second": shorten that one; False: not at all. None is False, unless `max_length` is given and
                `padding` is not: then it is True.
            max_length: in tokens, special ones included; `model_max_length` when None.
            stride: how many tokens overflowing pieces share with the piece before.
            is_split_into_words: the texts are lists of words already.
            pad_to_multiple_of: round padded lengths up to a multiple of this.
            padding_side: "right" or "left"; the tokenizer's own when None.
            return_tensors: "np" (int64 arrays), "jax" (int32 arrays) or None (lists).
            return_token_type_ids: None: when the model takes them.
            return_attention_mask: None: when the model takes them.
            return_overflowing_tokens: also return what truncation cut off, as further rows;
                `overflow_to_sample_mapping` tells whose.
            return_special_tokens_mask: also return `special_tokens_mask`, 1 for special tokens.
            return_offsets_mapping: also return `offset_mapping`, the characters `(start, end)` of each token.
            return_length: also return `length`, the number of tokens with padding.
            verbose: warn about inputs longer than the model takes.

        Returns:
            `input_ids`, `token_type_ids`, `attention_mask` and what else was asked for; a batch has one row for each
            text, a single text has no batch axis unless arrays or overflowing pieces were asked for.

        Raises:
            ValueError: an unknown strategy, no padding token, rows that make no array, no room for any token.
            TypeError: something that is not text.
        """
        shape = self._shape(padding, truncation, max_length, stride, pad_to_multiple_of, padding_side, verbose=verbose)
        rows, batched = _as_rows(text, text_pair, is_split_into_words)
        if shape.truncation is not None:
            self._check_room(shape, add_special_tokens, pair=bool(rows) and isinstance(rows[0], tuple))
        encodings, owners = self._encode(
            rows, shape, add_special_tokens, is_split_into_words, with_overflow=return_overflowing_tokens
        )
        if verbose and max_length is None:
            self._warn_if_too_long(encodings)

        names = self.model_input_names
        types = "token_type_ids" in names if return_token_type_ids is None else return_token_type_ids
        mask = "attention_mask" in names if return_attention_mask is None else return_attention_mask
        data: dict[str, Any] = {"input_ids": [e.ids for e in encodings]}
        if types:
            data["token_type_ids"] = [e.type_ids for e in encodings]
        if mask:
            data["attention_mask"] = [e.attention_mask for e in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [e.special_tokens_mask for e in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [e.offsets for e in encodings]
        if return_length:
            data["length"] = [len(e) for e in encodings]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = owners
        if not batched and return_tensors is None and not return_overflowing_tokens:
            data = {key: value[0] if isinstance(value[0], list) else value for key, value in data.items()}
        return BatchEncoding(data, encodings).with_tensors(return_tensors)

    def encode(self, text: str | Sequence[str], text_pair: str | Sequence[str] | None = None, **options: Any) -> Any:
        """The ids of one text or pair; `options` are those of a call.

        Raises:
            TypeError: a list of texts (`is_split_into_words=True` makes it a list of words).
        """
        if not isinstance(text, str) and not options.get("is_split_into_words"):
            raise TypeError("encode takes one text; call the tokenizer itself for a batch")
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of one text or pair as text; `options` are those of a call."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, special ones not counted."""
        counts: list[int] = []
        # In portions, as an encoding takes far more memory than its text.
        for start in range(0, len(texts), 4096):
            rows = list(texts[start : start + 4096])
            counts += [len(e) for e in self._encode(rows, _Shape(), False, False, with_overflow=False)[0]]
        return counts

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens a call puts around a text or a pair."""
        return self._backend.num_special_tokens_to_add(pair)

    def _shape(
        self,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        stride: int,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
        *,
        verbose: bool,
    ) -> _Shape:
        """Settles what the arguments leave open, the way transformers does."""
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        if padding is True and max_length is not None and truncation in (None, False, "do_not_truncate") and verbose:
            warnings.warn(
                "max_length does nothing when padding=True and there is no truncation; to pad to it, pass"
                " padding='max_length'",
                stacklevel=3,
            )
        pad = _choice("padding", padding, "longest", ("longest", "max_length"), "do_not_pad")
        cut = _choice("truncation", truncation, "longest_first", TRUNCATIONS, "do_not_truncate")
        if max_length is None and (pad == "max_length" or cut):
            if self.model_max_length > _NO_LIMIT_ABOVE:
                if verbose:
                    warnings.warn(
                        "no max_length is given and this tokenizer declares no model_max_length: texts keep their"
                        " length",
                        stacklevel=3,
                    )
                pad, cut = None if pad == "max_length" else pad, None
            else:
                max_length = self.model_max_length
        if padding_side not in (None, *SIDES):
            raise ValueError(f"padding_side={padding_side!r}: use 'right' or 'left'")
        if cut and pad and pad_to_multiple_of and max_length is not None and max_length % pad_to_multiple_of:
            raise ValueError(
                f"max_length={max_length} is not a multiple of pad_to_multiple_of={pad_to_multiple_of}, so a padded"
                " text could not be truncated to it"
            )
        shape = _Shape()
        if cut:
            shape = _Shape(cut, max_length, stride, self.truncation_side)
        if pad is None:
            return shape
        pad_token, pad_id = self._padding_token()
        return _Shape(
            shape.truncation,
            max_length if cut or pad == "max_length" else None,
            shape.stride,
            shape.truncation_side,
            pad,
            pad_to_multiple_of,
            padding_side or self.padding_side,
            pad_token,
            pad_id,
        )

    def _padding_token(self) -> tuple[str, int]:
        token, index = self.pad_token, self.pad_token_id
        if token is None or index is None:
            raise ValueError(
                f"{self.name_or_path} has no padding token; choose one of its vocabulary, e.g."
                " tokenizer.pad_token = tokenizer.eos_token"
            )
        return token, index

    def _check_room(self, shape: _Shape, add_special_tokens: bool, *, pair: bool) -> None:
        special = self.num_special_tokens_to_add(pair) if add_special_tokens else 0
        if shape.max_length is not None and shape.max_length < special:
            raise ValueError(f"max_length={shape.max_length} has no room: the special tokens alone take {special}")
        if shape.max_length is not None and 0 < shape.max_length - special <= shape.stride:
            raise ValueError(
                f"stride={shape.stride} leaves nothing new in a piece: max_length={shape.max_length} has room for"
                f" {shape.max_length - special} tokens beside {special} special ones"
            )

    def _encode(
        self, rows: list[Any], shape: _Shape, special: bool, words: bool, *, with_overflow: bool
    ) -> tuple[list[Encoding], list[int]]:
        """The encodings of the rows, with the number of the row that each came from."""
        backend = self._configured(shape)
        try:
            encodings = backend.encode_batch(rows, add_special_tokens=special, is_pretokenized=words)
        except TypeError:
            raise _explain_type_error(rows) from None
        # For a text that cannot be cut as asked the library raises a plain `Exception`, or panics, which is no
        # `Exception` and has a class that cannot be imported.
        except BaseException as error:
            if "Truncation error" not in str(error) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"truncation={shape.truncation!r} cannot bring every text to max_length={shape.max_length} with"
                f" stride={shape.stride}: {error}"
            ) from error
        found: list[Encoding] = []
        owners: list[int] = []
        for row, encoding in enumerate(encodings):
            pieces = [encoding, *encoding.overflowing] if with_overflow else [encoding]
            found += pieces
            owners += [row] * len(pieces)
        return found, owners

    def _clone(self) -> Backend:
        """A backend of its own settings that shares the vocabulary, which makes it cheap."""
        from tokenizers import Tokenizer as Backend

        clone = Backend(self._backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            value = getattr(self._backend, part)
            if value is not None:
                setattr(clone, part, value)
        clone.add_tokens([token for _, token in sorted(self._backend.get_added_tokens_decoder().items())])
        clone.encode_special_tokens = self._backend.encode_special_tokens
        return clone

    def _configure(self, shape: _Shape) -> Backend:
        """A backend that truncates and pads as `shape` says; never changed once made, so threads may share it."""
        backend = self._clone()
        if shape.truncation is not None:
            assert shape.max_length is not None
            backend.enable_truncation(
                shape.max_length, stride=shape.stride, strategy=shape.truncation, direction=shape.truncation_side
            )
        if shape.padding is not None:
            backend.enable_padding(
                direction=shape.padding_side,
                pad_id=shape.pad_id,
                pad_token=shape.pad_token,
                length=shape.max_length if shape.padding == "max_length" else None,
                pad_to_multiple_of=shape.pad_to_multiple_of,
            )
        return backend

    def _warn_if_too_long(self, encodings: list[Encoding]) -> None:
        longest = max(map(len, encodings), default=0)
        if longest > self.model_max_length:
            warnings.warn(
                f"a text has {longest} tokens and the model takes {self.model_max_length}; pass truncation=True",
                stacklevel=3,
            )

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pads what is encoded already: one example, a batch, or a list of examples.

        Args:
            encoded_inputs: `input_ids` with their masks, each [T] or [B, T], or a list of such examples. Other
                entries are left as they are.
            padding: as in a call.
            max_length: as in a call.
            pad_to_multiple_of: as in a call.
            padding_side: as in a call.
            return_attention_mask: None: when the model takes them; made when missing.
            return_tensors: as in a call; arrays stay arrays.

        Raises:
            ValueError: no `input_ids`, entries of different batch sizes, no padding token.
        """
        examples, batched, arrays = _as_examples(encoded_inputs)
        shape = self._shape(padding, False, max_length, 0, pad_to_multiple_of, padding_side, verbose=False)
        mask = "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask
        target = max_length
        if shape.padding == "longest":
            target = max((len(example["input_ids"]) for example in examples), default=0)
        elif shape.padding == "max_length":
            target = shape.max_length
        if target is not None and pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        fills = {"input_ids": shape.pad_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
        for example in examples:
            length = len(example["input_ids"])
            if mask:
                example.setdefault("attention_mask", [1] * length)
            missing = max(0, (target or 0) - length) if shape.padding else 0
            for key in fills.keys() & example.keys():
                fill = [fills[key]] * missing
                example[key] = fill + example[key] if shape.padding_side == "left" else example[key] + fill
        keys = list(examples[0]) if examples else ["input_ids"]
        data = {key: [example[key] for example in examples] for key in keys}
        if not batched:
            data = {key: rows[0] for key, rows in data.items()}
        return BatchEncoding(data).with_tensors(return_tensors or ("np" if arrays else None))

    # ------------------------------------------------------------------------------------------------- numbers to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids.

        Args:
            token_ids: an id, a list of ids, or an array [T]; ids outside the vocabulary stand for nothing.
            skip_special_tokens: leave out [CLS], [SEP], [PAD] and the like.
            clean_up_tokenization_spaces: take out spaces before punctuation; the tokenizer's own when None.

        Raises:
            ValueError: a negative id.
        """
        ids = _as_list(token_ids)
        ids = ids if isinstance(ids, list) else [ids]
        if any(not isinstance(index, int) for index in ids):
            raise ValueError("decode takes the ids of one text; batch_decode takes a batch")
        negative = next((index for index in ids if index < 0), None)
        if negative is not None:
            raise ValueError(f"no token has the id {negative}; -100 marks labels that do not count: replace it first")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        clean = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean is None else clean:
            for spaced, joined in _SPACES:
                text = text.replace(spaced, joined)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The texts of a list of lists of ids or of an array [B, T]."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in _as_list(sequences)]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or a list of ids of a list of tokens; unknown ones have the id of `unk_token`."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._backend.token_to_id(tokens)
        if index is None and self.unk_token is not None:
            return self._backend.token_to_id(self.unk_token)
        return index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list of tokens of a list of ids; None for ids outside the vocabulary."""
        ids = _as_list(ids)
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(index) for index in ids if index not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens into text."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    # ------------------------------------------------------------------------------------------------- the vocabulary

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary without added tokens; `len(tokenizer)` counts those too."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """Name -> token, of the special tokens there are."""
        found: dict[str, str | list[str]] = {key: self._special[key] for key in SPECIAL_TOKENS if key in self._special}
        if self.additional_special_tokens:
            found["additional_special_tokens"] = list(self.additional_special_tokens)
        return found

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        named = [self._special[key] for key in SPECIAL_TOKENS if key in self._special]
        return list(dict.fromkeys([*named, *self.additional_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [index for index in self.convert_tokens_to_ids(self.all_special_tokens) if index is not None]

    def add_tokens(self, new_tokens: str | Iterable[str], special_tokens: bool = False) -> int:
        """Adds tokens at the end of the vocabulary and returns how many were new.

        The model then needs `resize_token_embeddings(len(tokenizer))`.
        """
        from tokenizers import AddedToken

        texts = [new_tokens] if isinstance(new_tokens, str) else list(new_tokens)
        backend = self._clone()
        # Replaced rather than changed: another thread may be encoding with the old one.
        added = backend.add_tokens([AddedToken(text, special=special_tokens) for text in texts])
        self._backend = backend
        self._configured = lru_cache(maxsize=32)(self._configure)
        return added

    def add_special_tokens(self, special_tokens_dict: Mapping[str, str | Sequence[str]]) -> int:
        """Adds tokens like `{"pad_token": "[PAD]"}`, names them, and returns how many were new.

        Raises:
            ValueError: a name that no special token has.
        """
        names = (*SPECIAL_TOKENS, "additional_special_tokens")
        for name in special_tokens_dict:
            if name not in names:
                raise ValueError(f"there is no special token {name!r}; there are {', '.join(names)}")
        added = 0
        for name, value in special_tokens_dict.items():
            texts = [value] if isinstance(value, str) else list(value)
            added += self.add_tokens(texts, special_tokens=True)
            if name == "additional_special_tokens":
                self.additional_special_tokens = texts
            else:
                self._set_special(name, texts[0])
        return added

    def _set_special(self, name: str, token: str | None) -> None:
        if token is None:
            self._special.pop(name, None)
        elif self._backend.token_to_id(token) is None:
            raise ValueError(
                f"{name} = {token!r} is not in the vocabulary; add it with"
                f" tokenizer.add_special_tokens({{{name!r}: {token!r}}})"
            )
        else:
            self._special[name] = token


class AutoTokenizer(OwnClasses):
    """Finds the tokenizer of a checkpoint."""

    _classes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **options: Any) -> Any:
        """Opens the tokenizer of a folder or hub repository; as `Tokenizer.from_pretrained`.

        Returns:
            A `Tokenizer`; where a class of your own is registered for it, what that makes.
        """
        if cls._classes:
            from formax import hub

            where = {
                key: options[key] for key in ("revision", "cache_dir", "local_files_only", "token") if key in options
            }
            folder = hub.snapshot(path_or_repo, HUB_PATTERNS, **where)
            read = {name: folder / name for name in (CONFIG, "config.json") if (folder / name).is_file()}
            said = {name: parse_json(path.read_bytes(), path) for name, path in read.items()}
            named = said.get(CONFIG, {}).get("tokenizer_class"), said.get("config.json", {}).get("model_type")
            if own := next((cls._classes[name] for name in named if name in cls._classes), None):
                hub.refuse_code(options.get("trust_remote_code"))
                rest = {key: value for key, value in options.items() if key not in (*where, "trust_remote_code")}
                return own.from_pretrained(folder, **rest)
        return Tokenizer.from_pretrained(path_or_repo, **options)


# ------------------------------------------------------------------------------------------------------------- helpers


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _class_from_model_config(folder: Path) -> str:
    """The tokenizer class that config.json names or implies, "" when there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return ""
    config = parse_json(path.read_bytes(), path)
    return str(config.get("tokenizer_class") or CLASS_OF_MODEL_TYPE.get(str(config.get("model_type")), ""))


def _overrule_normalizer(backend: Backend, config: dict[str, Any], switches: Sequence[str]) -> None:
    """Lets `do_lower_case` and its like in tokenizer_config.json win over a BERT normalizer in tokenizer.json."""
    from tokenizers import normalizers

    if backend.normalizer is None or not switches:
        return
    state = json.loads(backend.normalizer.__getstate__())
    if state.pop("type", None) != "BertNormalizer":
        return
    wanted = {}
    for switch in switches:
        name, default = BERT_NORMALIZER[switch]
        wanted[name] = config.get(switch, default)
    if any(state[name] != value for name, value in wanted.items()):
        backend.normalizer = normalizers.BertNormalizer(**(state | wanted))


def _overrule_prefix_space(backend: Backend, config: dict[str, Any]) -> None:
    """Lets `add_prefix_space` in tokenizer_config.json, False where missing, win over a byte-level tokenizer.json."""
    from tokenizers import pre_tokenizers

    wanted = config.get("add_prefix_space", False)
    if backend.pre_tokenizer is None or not isinstance(wanted, bool):
        return
    state = json.loads(backend.pre_tokenizer.__getstate__())
    if state.pop("type", None) == "ByteLevel" and state["add_prefix_space"] != wanted:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**(state | {"add_prefix_space": wanted}))


def _choice(name: str, value: bool | str | None, default: str, known: tuple[str, ...], nothing: str) -> str | None:
    """Reads a strategy: True is `default`; False, None and `nothing` are None."""
    if value is True:
        return default
    if value is False or value is None or value == nothing:
        return None
    if value not in known:
        raise ValueError(f"{name}={value!r}: use True, False, {', '.join(map(repr, known))}")
    return value


def _as_rows(text: Any, text_pair: Any, words: bool) -> tuple[list[Any], bool]:
    """A list of texts, or of tuples for pairs, with whether the caller gave a batch."""
    for name, value in (("text", text), ("text_pair", text_pair)):
        if not isinstance(value, str | list | tuple) and not (name == "text_pair" and value is None):
            raise TypeError(f"{name} is {type(value).__name__}; give a text or a list of texts")
    if words and isinstance(text, str):
        raise TypeError("is_split_into_words=True takes lists of words, and text is a string")
    batched = not isinstance(text, str) and (not words or bool(text and isinstance(text[0], list | tuple)))
    if not batched:
        # An empty second text counts as none, as in transformers.
        return [(text, text_pair) if text_pair else text], False
    if text_pair is None:
        return list(text), True
    if isinstance(text_pair, str) or len(text_pair) != len(text):
        count = "one string" if isinstance(text_pair, str) else f"{len(text_pair)} texts"
        raise ValueError(f"text_pair must have as many texts as text, {len(text)}, and has {count}")
    return list(zip(text, text_pair, strict=True)), True


def _explain_type_error(rows: list[Any]) -> Exception:
    """Says which row is not text, where the library only says that some row is not."""
    for number, row in enumerate(rows):
        for part in row if isinstance(row, tuple | list) else [row]:
            for text in part if isinstance(part, tuple | list) else [part]:
                if not isinstance(text, str):
                    return TypeError(f"text {number} holds {type(text).__name__} ({text!r:.40}), not a string")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    what = f"character {error.start} is half of a surrogate pair"
                    return ValueError(f"text {number} is not valid Unicode: {what}")
    return TypeError("the texts do not have the form that is_split_into_words asks for")


def _as_list(value: Any) -> Any:
    """Arrays as lists of Python numbers, at any depth of nesting in lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_as_list(item) for item in value]
    return value


def _as_examples(inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], bool, bool]:
    """A list of examples, whether it was more than one, and whether the ids were arrays.

    Raises:
        ValueError: no `input_ids`, or entries of different batch sizes.
    """
    if not isinstance(inputs, Mapping):
        for number, example in enumerate(inputs):
            if "input_ids" not in example:
                raise ValueError(f"example {number} has no 'input_ids'; it has {', '.join(example)}")
        arrays = any(hasattr(example["input_ids"], "tolist") for example in inputs)
        return [{key: _as_list(value) for key, value in example.items()} for example in inputs], True, arrays
    if "input_ids" not in inputs:
        raise ValueError(f"there is no 'input_ids' to pad; there is {', '.join(inputs)}")
    arrays = hasattr(inputs["input_ids"], "tolist")
    lists = {key: _as_list(value) for key, value in inputs.items()}
    rows = lists["input_ids"]
    if rows and not isinstance(rows[0], list):
        return [lists], False, arrays
    sizes = {key: len(value) for key, value in lists.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"entries differ in batch size: {sizes}")
    return [{key: value[row] for key, value in lists.items()} for row in range(len(rows))], True, arrays
