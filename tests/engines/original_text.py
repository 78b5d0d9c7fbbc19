"""Run by test_engines.py with an old transformers first on the path: the original Medusa decodes a prompt greedily.

    python tests/engines/original_text.py SOURCE HEADS PROMPT TOKENS

SOURCE holds the package medusa. PROMPT: tokens `[1, T]`; TOKENS gets those that it writes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch


def main(source: Path, heads: Path, prompt: Path, out: Path):
    sys.path.insert(0, str(source))
    import medusa.model.medusa_model as theirs
    import transformers

    # Only its end is used here, and tokenizers of today have another format.
    tokenizer = SimpleNamespace(eos_token_id=-1, decode=lambda ids, **kwargs: " ".join(str(int(i)) for i in ids))
    theirs.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *args, **kwargs: tokenizer)
    model = theirs.MedusaModel.from_pretrained(str(heads))
    ids = torch.load(prompt)
    # A tree no deeper than two heads: it makes five heads whatever config.json says, the others random.
    steps = model.medusa_generate(
        ids, temperature=0.0, max_steps=40, medusa_choices=[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)]
    )
    passes = 0
    for step in steps:
        passes, text = passes + 1, step["text"]
    print(f"transformers {transformers.__version__}: {len(text.split())} tokens in {passes} passes")
    torch.save(torch.tensor([int(x) for x in text.split()]), out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
