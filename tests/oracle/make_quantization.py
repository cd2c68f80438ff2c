"""Records the names and defaults of the reference's quantisation settings in `tests/data/quantization.json`.

python tests/oracle/make_quantization.py
"""

import inspect
import json
from pathlib import Path
from typing import Any

from transformers.quantizers import auto
from transformers.utils import quantization_config

DATA = Path(__file__).resolve().parent.parent / "data"


def main() -> None:
    """Writes the record."""
    record: dict[str, Any] = {}
    for method, cls in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items():
        found = inspect.signature(cls.__init__).parameters.values()
        record[method.removesuffix("_4bit").removesuffix("_8bit")] = {
            "class": cls.__name__,
            "fields": {
                one.name: "required" if one.default is one.empty else one.default
                for one in found
                if one.name not in ("self", "kwargs", "quant_method")
            },
        }
    # What the ones write that need no package of their own.
    written = {}
    ones: tuple[Any, ...] = (
        quantization_config.AwqConfig(bits=4, version="gemv"),
        quantization_config.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
        quantization_config.FineGrainedFP8Config(modules_to_not_convert=["lm_head"]),
        quantization_config.QuantoConfig(weights="int4"),
        quantization_config.HiggsConfig(bits=2),
    )
    for one in ones:
        written[type(one).__name__] = one.to_dict()
    text = json.dumps({"signatures": record, "written": written}, indent=1, sort_keys=True, default=str)
    (DATA / "quantization.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
