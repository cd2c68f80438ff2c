"""Makes `tests/data/healing.json`: prompts whose end the reference's token healing chooses anew, and what it chooses.

    python tests/oracle/make_healing.py          # writes
    python tests/oracle/make_healing.py --check  # compares with the file; status 1 if it differs

Run it in the environment of requirements.txt. The model is a GPT-2 of known weights, with the vocabulary of
`tests/data/text/bytelevel`.

What a reimplementer must know, and may not expect
--------------------------------------------------

- Prompts are decoded, stripped and tokenised again before they are healed, and padding is that of the tokenizer: a
  prompt that is not what its tokenizer makes of its text comes back as another. Here all are.
- A token of the beginning is replaced by padding: what is healed does not follow from it. formax lets it count.
- A last token that begins with a space is never healed where a space has a token with another look ("Ġ"), for it is
  looked for as " t" among tokens that are "Ġt". formax compares tokens with tokens.
- A prompt of one token is healed as what follows the beginning of a text, but only if its tokenizer wrote that.
- Tokens that begin as the last one are ten ahead of all others, the last one eleven: another can still win.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oracle.make_generate import SEEDS, Model, opened, settle, written

TESTS = Path(__file__).resolve().parent.parent
PATH = TESTS / "data" / "healing.json"
TOKENIZER = TESTS / "data" / "text" / "bytelevel"
TEXTS = ["the qi", "no xe", "dog zt", "it xc", "of qa", "are zi", "zxe", "zqt", "not xa", "dog xi"]


def model_of(vocabulary: int) -> Model:
    config = {"vocab_size": vocabulary, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32,
              "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return Model("GPT2LMHeadModel", config, ((r"wte", 1.0),))


def main() -> int:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER / "tokenizer.json"), bos_token="<s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    vocabulary = len(tokenizer)
    stored = written(model_of(vocabulary))
    cases: dict[str, Any] = {}
    for text in TEXTS:
        ids = tokenizer([text], return_tensors="pt").input_ids
        answers = []
        for seed in (None, *SEEDS):
            with torch.inference_mode():
                answers.append(opened(stored, None, seed).heal_tokens(ids.clone(), tokenizer).tolist()[0])
        if any(one != answers[0] for one in answers):
            sys.exit(f"{text!r}: weights that are a little off change what is chosen")
        cases[text] = {"ids": ids.tolist()[0], "healed": answers[0]}
    if not any(case["ids"] != case["healed"] for case in cases.values()):
        sys.exit(f"nothing is healed: {cases}")
    return settle(PATH, {"transformers": transformers.__version__, "model": stored, "cases": cases})


if __name__ == "__main__":
    sys.exit(main())
