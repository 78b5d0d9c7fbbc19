"""Writes trained heads for another program, in its names and files, and says how to start it there.

    python export.py out/heads --to vllm --output out/heads-vllm --verify

    vllm, tgi, original, trtllm, mlc   that engine's files (docs/engines.md: versions, what was tried, what is lost)
    hub                                heads as they are, with a model card; --repo_id NAME uploads them
    hf                                 a checkpoint of stage 2 (out/checkpoint-500) as a model with heads
    peft-merged                        a backbone that is a peft adapter, with its heads, as a plain model with heads

--verify reads the exported files again and compares the heads' logits. Nothing is written for heads that the engine
cannot load.
"""

import argparse
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from common import errors, terminal
from common.errors import BadInput
from common.files import check_can_write
from conversations.tokenizer import load_tokenizer
from medusa_model import MedusaModel
from model import engines
from model.adapter import base_of_adapter
from model.backbone import load_backbone_config
from model.card import upload, write_card
from model.config import MedusaConfig
from model.foreign import TOKEN_MAP
from model.heads_file import base_of, find_heads, load_config, load_heads, save_heads, tokenizer_of
from model.readable import make_readable
from training.whole import is_checkpoint, model_of

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """Raises BadInput for flags that do not belong together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("heads", help="the --output_dir of a training run, or one of its checkpoints")
    add("--to", required=True, choices=(*engines.ENGINES, "hub", "hf", "peft-merged"))
    add("--output", required=True, type=Path, help="a directory to write")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of what is written (default: as it is)")
    add("--base_model", help="the backbone, if it has another name where the engine runs")
    add("--verify", action="store_true", help="compare the heads' logits with those of the exported files")
    add("--repo_id", help="hub: where to upload, as NAME or ORGANISATION/NAME; needs `hf auth login`")
    add("--licence", help="hub: of the heads, such as apache-2.0, for the model card")
    args = parser.parse_args()
    if (args.repo_id or args.licence) and args.to != "hub":
        raise BadInput("--repo_id and --licence belong to --to hub")
    if args.verify and args.to not in engines.ENGINES:
        raise BadInput(f"--verify compares files of an engine; --to {args.to} has the names of this repository")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise BadInput(f"--output {args.output} is there and not empty: choose another directory")
    check_can_write(args.output, "--output")
    return args


def whole_model(args):
    """--to hf and --to peft-merged."""
    model: Any  # transformers annotates `to` without its self
    if args.to == "hf":
        if not is_checkpoint(args.heads):
            raise BadInput(
                f"--to hf: {args.heads} is no checkpoint of stage 2; a finished run is such a model already"
            )
        model = model_of(args.heads, args.base_model)
    else:
        directory, backbone_dir = find_heads(args.heads)
        adapter = str(backbone_dir or args.base_model or base_of(MedusaConfig(**load_config(directory)), directory))
        if base_of_adapter(adapter) is None:
            raise BadInput(f"--to peft-merged: the backbone {adapter} is no peft adapter")
        model = MedusaModel.from_pretrained(args.heads, args.base_model)
    if args.dtype:
        model.to(getattr(torch, args.dtype))
    model.save_pretrained(args.output, include_backbone=True)
    load_tokenizer(model.backbone.name_or_path, needs_template=False).save_pretrained(args.output)
    make_readable(args.output)
    print(f"{args.output} holds the backbone, with the heads in medusa_heads/")


def main():
    terminal.start()
    args = parse_arguments()
    if args.to in ("hf", "peft-merged"):
        return whole_model(args)
    heads_dir, backbone_dir = find_heads(args.heads)
    config, tensors = load_heads(heads_dir)
    base = args.base_model or str(backbone_dir or base_of(MedusaConfig(**config), heads_dir))
    config["base_model_name_or_path"] = base
    if config.get("shares_lm_head"):
        raise BadInput(f"{args.heads}: these heads share the lm_head, and every format here has a projection for each")
    if args.dtype:
        dtype = getattr(torch, args.dtype)
        tensors = {name: tensor if name == TOKEN_MAP else tensor.to(dtype) for name, tensor in tensors.items()}
        if lost := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise BadInput(
                f"--dtype {args.dtype} cannot hold {lost[0]}: it becomes infinite. Take bfloat16 or float32"
            )
    if args.to == "hub":
        if os.path.isdir(base):
            raise BadInput(
                f"--to hub: the card would name {base}, a directory here: give --base_model NAME of the Hub"
            )
        save_heads(tensors, MedusaConfig(**config).to_dict(), args.output)
        if (accuracy := Path(args.heads) / "accuracy.json").is_file():
            shutil.copy(accuracy, args.output)
        write_card(Path(args.heads), config, base, args.licence, args.output)
    else:
        engine = engines.ENGINES[args.to]
        engines.check(engine, args.to, config)
        if args.to == "original" and os.path.isdir(base):
            engines.check_rope(load_backbone_config(base))
        engines.write(engine, config, tensors, args.output)
    here = args.base_model if os.path.isdir(args.base_model or "") else None  # else it is a name for elsewhere
    tokenizer = load_tokenizer(tokenizer_of(heads_dir, backbone_dir, here), needs_template=False)
    tokenizer.save_pretrained(args.output)
    make_readable(args.output)
    if args.to == "hub":
        print(f"{args.output} holds the heads and README.md, their card: read it before you upload it")
        return upload(args.output, args.repo_id) if args.repo_id else None
    if args.verify:
        apart = engines.difference(engine, config, tensors, args.output)
        print(f"read back, the logits of 16 random hidden states differ by {apart:.1g} of the largest one")
        if not apart < 1e-4:  # fp32 sums in another order give 1e-6
            shutil.rmtree(args.output)
            raise BadInput(f"what was written to {args.output} does not hold the same heads, and was removed")
    if config.get("medusa_vocab_size") is not None:
        logger.warning(
            "vLLM 0.29 to 0.32 make room for all tokens in every head and stop at a part of them, by their source: "
            "take heads without --medusa_vocab_size there"
        )
    print(f"for {engine.versions}:\n  {engine.start(base, os.path.abspath(args.output), config['medusa_num_heads'])}")


if __name__ == "__main__":
    errors.run(main)
