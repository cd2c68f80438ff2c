"""Sentence embeddings: one vector for a text, close to those of texts that mean the same.

Reads what sentence-transformers writes (modules.json and the folders it names) and gives the same vectors. A folder
without modules.json is pooled by the mean over its tokens and normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.text.files import parse_json
from formax.text.tokenizer import UNLIMITED, Tokenizer

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens")
# The switches of 1_Pooling/config.json, in the order in which their vectors are joined.
_POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SHORTEST_BUCKET = 32
# Texts that are tokenized together: bounds the memory that tokens take on their way.
_WINDOW = 1024


def pool(hidden: jax.Array, mask: jax.Array, mode: str) -> jax.Array:
    """Makes one vector of the vectors of a text's tokens.

    Args:
        hidden: [B, T, H].
        mask: [B, T], 1 for tokens and 0 for padding.
        mode: "mean"; "mean_sqrt_len_tokens", the sum over the square root of the number; "max" of each feature; "cls",
            the first token.

    Returns:
        [B, H]
    """
    if mode == "cls":
        first = jnp.argmax(mask > 0, axis=1)
        return jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]
    present = mask[..., None] > 0
    if mode == "max":
        return jnp.max(jnp.where(present, hidden, -jnp.inf), axis=1)
    total = jnp.sum(jnp.where(present, hidden, 0), axis=1)
    count = jnp.maximum(jnp.sum(present, axis=1), 1).astype(hidden.dtype)
    return total / (count if mode == "mean" else jnp.sqrt(count))


def embed(
    model: Any, inputs: dict[str, jax.Array], *, pooling: Sequence[str] = ("mean",), normalize: bool = True
) -> jax.Array:
    """The embeddings of tokenized texts: a pure function.

    Args:
        model: called with the inputs, gives `last_hidden_state` [B, T, H].
        inputs: `input_ids`, `attention_mask` and what else the model takes, each [B, T].
        pooling: modes of `pool`; several are joined.
        normalize: bring each vector to length 1.

    Returns:
        [B, H * len(pooling)], float32
    """
    hidden = model(**inputs).last_hidden_state.astype(jnp.float32)
    vectors = jnp.concatenate([pool(hidden, inputs["attention_mask"], mode) for mode in pooling], axis=-1)
    if normalize:
        vectors = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors


_compiled_embed = jax.jit(embed, static_argnames=("pooling", "normalize"))


@dataclass(frozen=True)
class SentenceEncoder:
    """A model that embeds texts, with its tokenizer and the way its vectors are made.

    Attributes:
        model: called with `input_ids` and masks, gives `last_hidden_state`.
        tokenizer: makes the inputs.
        max_length: tokens that a text may have, special ones included; what is beyond is not read.
        pooling: modes of `pool`; the vectors of several are joined.
        normalize: whether vectors have length 1.
        lower_case: whether texts are put in lower case first.
        prompts: texts that the checkpoint puts before others, by use ("query", "passage", ...).
        default_prompt: put before a text when no prompt is given.
    """

    model: Any
    tokenizer: Tokenizer
    max_length: int
    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = True
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        dtype: Any = None,
    ) -> SentenceEncoder:
        """Opens a checkpoint of sentence-transformers, or of any model that gives one vector for each token.

        Args:
            path_or_repo: a folder, or a repository like "sentence-transformers/all-MiniLM-L6-v2".
            revision: branch, tag or commit of a repository.
            cache_dir: where downloads are kept.
            local_files_only: never use the network.
            token: for repositories that are not public.
            dtype: of the parameters; the checkpoint's own when None.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            OSError: there is no such folder or repository.
            ValueError: a file that cannot be understood, or a module that formax does not have.
        """
        from formax import hub
        from formax.auto import AutoConfig, AutoModel

        folder = hub.checkpoint(
            path_or_repo, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        layout = read_layout(folder)
        # The quick checks come before the weights.
        config = AutoConfig.from_pretrained(layout.transformer)
        tokenizer = Tokenizer.from_pretrained(layout.transformer)
        positions = getattr(config, "max_position_embeddings", None) or UNLIMITED
        limit = min(layout.max_seq_length or tokenizer.model_max_length, positions)
        if limit >= UNLIMITED:
            raise ValueError(
                f"{folder} limits the length of texts nowhere; say it in sentence_bert_config.json,"
                ' e.g. {"max_seq_length": 512}'
            )
        model = AutoModel.from_pretrained(layout.transformer, dtype=dtype)
        return cls(
            model,
            tokenizer,
            limit,
            layout.pooling,
            layout.normalize,
            layout.lower_case,
            layout.prompts,
            layout.default_prompt,
        )

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        normalize: bool | None = None,
        prompt: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Embeds texts.

        Texts of similar length go through the model together, padded to one of `buckets()`, so that it is compiled for
        a handful of shapes whatever the texts.

        Args:
            texts: one text or many.
            batch_size: texts that go through the model together.
            normalize: bring vectors to length 1; as the checkpoint says when None.
            prompt: put before each text; the checkpoint's default when None.
            progress: called with the number of texts done and the number of texts, as it goes.

        Returns:
            float32 [n, d], or [d] for one text that is not in a list.

        Raises:
            TypeError: something that is not text.
            ValueError: a batch size below 1.
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size=batch_size, normalize=normalize, prompt=prompt, progress=progress)[0]
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch has at least one text")
        given: Sequence[object] = texts
        wrong = next((number for number, text in enumerate(given) if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"text {wrong} is {type(given[wrong]).__name__}, not a string")
        prompt = self.default_prompt if prompt is None else prompt
        length_one = self.normalize if normalize is None else normalize
        found = np.empty((len(texts), self.dimension), np.float32)
        done = 0
        for rows, inputs in self._batches(texts, prompt, batch_size):
            vectors = np.asarray(_compiled_embed(self.model, inputs, pooling=self.pooling, normalize=length_one))
            found[rows] = vectors[: len(rows)]
            done += len(rows)
            if progress is not None:
                progress(done, len(texts))
        return found

    def buckets(self) -> tuple[int, ...]:
        """The lengths in tokens that batches are padded to: powers of two up to `max_length`, and that."""
        lengths = []
        length = _SHORTEST_BUCKET
        while length < self.max_length:
            lengths.append(length)
            length *= 2
        return (*lengths, self.max_length)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, special ones and prompts not counted."""
        return self.tokenizer.count_tokens([text.lower() if self.lower_case else text for text in texts])

    @property
    def dimension(self) -> int:
        """The length d of a vector."""
        return int(self.model.config.hidden_size) * len(self.pooling)

    @property
    def room(self) -> int:
        """Tokens of a text that are read, beside special ones."""
        return self.max_length - self.tokenizer.num_special_tokens_to_add()

    def _batches(
        self, texts: Sequence[str], prompt: str, batch_size: int
    ) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
        """Rows that go together, and their inputs [batch_size, bucket]; the last batch repeats a row to be full."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
        size = min(batch_size, 1 << max(0, len(texts) - 1).bit_length())
        window = max(1, _WINDOW // size) * size
        buckets = self.buckets()
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            prepared = [prompt + texts[row] for row in rows]
            encoded = self.tokenizer(
                [text.lower() for text in prepared] if self.lower_case else prepared,
                truncation=True,
                max_length=self.max_length,
            )
            by_length = sorted(range(len(rows)), key=lambda at: len(encoded["input_ids"][at]), reverse=True)
            for first in range(0, len(rows), size):
                chosen = by_length[first : first + size]
                longest = len(encoded["input_ids"][chosen[0]])
                bucket = next(length for length in buckets if length >= longest)
                full = [*chosen, *[chosen[-1]] * (size - len(chosen))]
                batch = self.tokenizer.pad(
                    {name: [values[at] for at in full] for name, values in encoded.items()},
                    padding="max_length",
                    max_length=bucket,
                    return_tensors="np",
                )
                # A look-up inside a compiled function clips ids to the table in silence.
                highest, table = batch["input_ids"].max(), self.model.config.vocab_size
                if highest >= table:
                    raise ValueError(
                        f"the tokenizer gives the id {highest}, and the model has {table} rows: they do not belong"
                        " together"
                    )
                yield (
                    np.asarray([rows[at] for at in chosen]),
                    {name: jnp.asarray(values, jnp.int32) for name, values in batch.items()},
                )


# ------------------------------------------------------------------------------------------ sentence-transformers files


@dataclass(frozen=True)
class Layout:
    """What the files of sentence-transformers say.

    Attributes:
        transformer: the folder of the model and its tokenizer.
        pooling: modes of `pool`, in the order in which their vectors are joined.
        normalize: whether vectors are brought to length 1.
        max_seq_length: tokens that a text may have, None when that follows from the model.
        lower_case: whether texts are put in lower case first.
        prompts: texts to put before others, by use.
        default_prompt: the one for texts of no special use.
    """

    transformer: Path
    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = True
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""


def read_layout(folder: Path) -> Layout:
    """Reads modules.json and the files it names; a folder without it has mean pooling and normalisation.

    Raises:
        ValueError: a file that cannot be understood, a module or a pooling that formax does not have.
    """
    where = folder / "modules.json"
    if not where.is_file():
        return Layout(folder)
    modules = _read(where, list)
    kinds: list[str] = []
    paths: list[Path] = []
    for number, module in enumerate(modules):
        kind = module.get("type") if isinstance(module, dict) else None
        path = module.get("path", "") if isinstance(module, dict) else None
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ValueError(f'{where}: module {number} is {module!r}, not an object with a "type" and a "path"')
        kinds.append(kind.rpartition(".")[2])
        paths.append(_inside(folder, path, where))
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{where} chains {', '.join(kinds) or 'no modules'}; formax has Transformer, Pooling and then, if at all,"
            " Normalize"
        )
    settings = _read_if_there(paths[0] / "sentence_bert_config.json")
    prompts, default = _read_prompts(folder / "config_sentence_transformers.json")
    pooling = _read_pooling(paths[1] / "config.json", bool(default or any(prompts.values())))
    length = settings.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"{paths[0] / 'sentence_bert_config.json'}: 'max_seq_length' is {length!r}, not a number")
    lower = bool(settings.get("do_lower_case", False))
    return Layout(paths[0], pooling, len(kinds) == 3, length, lower, prompts, default)


def _inside(folder: Path, path: str, where: Path) -> Path:
    """The path of a module, which must be inside the checkpoint's folder."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{where}: the path {path!r} leads out of the folder")
    return folder / path


def _read_pooling(path: Path, has_prompts: bool) -> tuple[str, ...]:
    config = _read(path, dict)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in _POOLING_SWITCHES.items() if config.get(switch)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in POOLINGS for mode in modes):
        raise ValueError(f"{path}: pools by {modes!r}; formax has {', '.join(POOLINGS)}")
    if has_prompts and not config.get("include_prompt", True):
        raise ValueError(f"{path}: 'include_prompt' is false, and formax pools over a prompt's tokens too")
    return tuple(modes)


def _read_prompts(path: Path) -> tuple[dict[str, str], str]:
    """The prompts by use, and the one for texts of no special use."""
    config = _read_if_there(path)
    prompts = config.get("prompts") or {}
    default = config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{path}: 'prompts' is {prompts!r}, not texts by name")
    prompts = {str(name): text or "" for name, text in prompts.items()}
    if default is not None and default not in prompts:
        raise ValueError(f"{path}: 'default_prompt_name' is {default!r}, and 'prompts' has {', '.join(prompts)}")
    return prompts, prompts.get(default, "") if default is not None else ""


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path, dict) if path.is_file() else {}


def _read(path: Path, kind: type) -> Any:
    """The object or list in a JSON file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, and modules.json names its folder") from None
    return parse_json(content, path, kind)
