"""What `make_flax.py`, `make_tf.py` and the tests of their files share: the cases, and the weights of a case.

A case is a golden's configuration, perhaps with other sizes, and its weights, which are a function of their PyTorch
names. The generators put them into the reference's Flax and TensorFlow classes, by the reference's own rules of names,
and record every tensor's name, shape, dtype and checksum in the files that these save. A few tiny files are kept.

Run by itself it has formax write all cases, for `--check` of the generators:

    python tests/oracle/frameworks.py flax /tmp/flax && python tests/oracle/make_flax.py --check /tmp/flax
"""

import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
GOLDENS = HERE.parent / "goldens"
DATA = HERE.parent / "data"

Tensor = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        golden: "family/case".
        changes: fields of the configuration that differ from the golden's, sizes mostly.
        shard_size: `max_shard_size` of the save.
        kept: whether the files are kept, too.
    """

    golden: str
    changes: dict[str, Any] = field(default_factory=dict)
    shard_size: str = "10GB"
    kept: bool = False

    @property
    def name(self) -> str:
        """Of its record."""
        return self.golden.replace("/", "-") + ("-tiny" if self.kept else "")

    @property
    def meta(self) -> dict[str, Any]:
        """The golden."""
        return json.loads((GOLDENS / f"{self.golden}.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {**self.meta["config"], **self.changes, "architectures": [self.meta["architecture"]]}

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor by its PyTorch name."""
        from oracle import weights

        with np.load(GOLDENS / f"{self.golden}.npz") as arrays:
            if f"key.{name}" in arrays:
                return arrays[f"key.{name}"]
        return weights.tensor(self.meta.get("copies", {}).get(name, name), shape)


BERT = {
    "vocab_size": 11,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "max_position_embeddings": 9,
    "num_hidden_layers": 1,
}
T5 = {"vocab_size": 11, "d_model": 6, "d_kv": 2, "d_ff": 5, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 3}
RESNET = {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "stage_names": ["stem", "stage1"]}
RESNET |= {"out_features": ["stage1"], "out_indices": [1]}
SQUARE = {"image_size": 12, "patch_size": 4}  # their classes know no other images
EQUAL = {"conv_dim": [11, 11, 11]}  # TensorFlow's class has as many channels going into a convolution as come out

# Each a family of its own in both frameworks, or a head that is called otherwise than its relatives'.
BOTH = (
    *map(Case, ("albert/pre_training", "albert/token_classification", "blenderbot/conditional_generation")),
    *map(Case, ("blenderbot_small/conditional_generation", "distilbert/masked_lm", "distilbert/question_answering")),
    *map(Case, ("electra/pre_training", "electra/multiple_choice", "gptj/causal_lm", "marian/conditional_generation")),
    *map(Case, ("mbart/conditional_generation", "mt5/conditional_generation", "mt5/encoder")),
    *map(Case, ("opt/causal_lm", "pegasus/conditional_generation", "roberta/masked_lm")),
    *map(Case, ("roberta/sequence_classification", "roberta_prelayernorm/causal_lm")),
    *(Case(f"roformer/{head}", {"embedding_size": 36}) for head in ("masked_lm", "multiple_choice")),
    *map(Case, ("xlm_roberta/masked_lm", "encoder_decoder/bert_gpt2")),
    *map(Case, ("vision_encoder_decoder/labels", "vision_text_dual_encoder/vit_bert")),
)
PLAIN_ROPE = {"rope_theta": 10000.0}  # theirs are not to be chosen
WHOLE = {"head_dim": 6, "sliding_window": None}  # TensorFlow's Mistral knows no other heads, and no windows
CASES: dict[str, tuple[Case, ...]] = {
    "flax": (
        *BOTH,
        Case("bloom/causal_lm", {"hidden_size": 32, "n_head": 4}),  # of other numbers its class has no slopes
        Case("gemma/causal_lm", PLAIN_ROPE | {"hidden_activation": None}),
        Case("mistral/causal_lm", PLAIN_ROPE | {"head_dim": 6}),
        *map(Case, ("gpt_neo/causal_lm", "longt5/conditional_generation", "longt5/global", "electra/causal_lm")),
        Case("mbart/sequence_classification"),
        Case("xglm/causal_lm"),
        *map(Case, ("bert/model", "bert/pre_training", "bert/untied", "gpt2/model", "gpt2/cross", "gpt2/untied")),
        Case("llama/plain_heads", {"rope_theta": 10000.0}),
        *map(Case, ("llama/old_names", "t5/gated_untied", "t5/encoder", "bart/conditional_generation")),
        Case("bart/causal_lm"),
        Case("vit/image_classification", SQUARE),
        *map(Case, ("resnet/basic", "clip/model", "clip/vision_model", "clip/text_projection", "whisper/untied")),
        Case("whisper/audio_classification"),
        *map(Case, ("wav2vec2/stable", "wav2vec2/pre_training")),
        *map(Case, ("dinov2/swiglu", "dinov2/image_classification", "regnet/model")),
        *map(Case, ("beit/masked_image_modeling", "beit/image_classification")),
        *map(Case, ("big_bird/question_lengths", "big_bird/sequence_classification")),
        Case("bert/masked_lm", BERT, "2KB", kept=True),
        Case("resnet/image_classification", RESNET, kept=True),
    ),
    "tf": (
        *BOTH,
        *map(Case, ("gptj/sequence_classification", "regnet/image_classification")),
        *(Case(f"mistral/{head}", WHOLE) for head in ("causal_lm", "sequence_classification")),
        Case("xglm/causal_lm", {"tie_word_embeddings": False}),
        *map(Case, ("encoder_decoder/bert_bert", "vision_encoder_decoder/vit_gpt2", "vision_text_dual_encoder/loss")),
        *map(Case, ("bert/model", "bert/pre_training", "gpt2/cross", "gpt2/double_heads")),
        *map(Case, ("t5/gated_untied", "bart/conditional_generation")),
        Case("vit/image_classification", SQUARE),
        *map(Case, ("resnet/basic", "clip/model", "clip/text_model", "whisper/conditional_generation")),
        Case("wav2vec2/ctc", EQUAL),
        Case("bert/masked_lm", BERT, kept=True),
        Case("t5/encoder", T5, "1KB", kept=True),
    ),
}


def turned(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of PyTorch's tensor, where another framework's kernel has this one."""
    if name.rpartition("/")[2].partition(":")[0] != "kernel":
        return shape
    return {2: shape[::-1], 3: shape[::-1]}.get(len(shape)) or (shape[3], shape[2], shape[0], shape[1])


def record(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """{name: shape, dtype and checksum}."""
    return {
        name: [list(x.shape), x.dtype.name, zlib.crc32(np.ascontiguousarray(x).tobytes())]
        for name, x in tensors.items()
    }


def path_of(framework: str, case: Case) -> Path:
    """Where the record of a case lies."""
    return DATA / framework / f"{case.name}.json"


def dump(value: dict[str, Any]) -> str:
    """A record as text, a tensor a line."""
    head = {name: part for name, part in value.items() if name != "tensors"}
    lines = [f"{json.dumps(name)}: {json.dumps(one, separators=(',', ':'))}" for name, one in value["tensors"].items()]
    text = json.dumps({**head, "tensors": 0}, indent=1)
    return text.replace('"tensors": 0', '"tensors": {\n' + ",\n".join(lines) + "\n}") + "\n"


def main(framework: str, out: str) -> None:
    """Has formax write all cases."""
    import formax

    for case in CASES[framework]:
        model_from(case, Path(out) / case.name / "pytorch", formax).save_pretrained(
            Path(out) / case.name / framework, format=framework, max_shard_size=case.shard_size
        )
        print(case.name)


def model_from(case: Case, folder: Path, formax: Any) -> Any:
    """The case's model, opened by formax from a checkpoint with PyTorch's names, which is written into `folder`."""
    from safetensors.numpy import save_file

    from formax.core import registry
    from formax.core.spec import table

    config = case.config
    family = registry.family(config["model_type"])
    found = family.find(config["architectures"][0])
    assert found is not None, config["architectures"]
    parsed = family.config.from_dict(config, source=case.name)
    stored = table(found.spec(parsed)).stored()
    tensors = {name: case.weight(name, entries[0].stored_shape) for name, entries in stored.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return formax.from_pretrained(folder)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main(*sys.argv[1:])
