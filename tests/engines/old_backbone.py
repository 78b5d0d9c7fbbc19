"""Run by test_engines.py with transformers 4 first on the path: a stage 2 directory's logits and tokens.

python tests/engines/old_backbone.py - DIRECTORY IDS LOGITS
"""

import sys
from pathlib import Path

import torch


def main(_source: Path, directory: Path, ids: Path, out: Path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    print(f"transformers {transformers.__version__}, {type(tokenizer).__name__}")
    with torch.inference_mode():
        logits = model(torch.load(ids)).logits
    torch.save((logits, tokenizer("the cold moon and salt water")["input_ids"], tokenizer.chat_template), out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
