"""Speed and memory of whole training steps on one GPU, through the real trainer: data loading, optimiser, logging.

    python benchmark/throughput.py --stage 1 --out benchmark/results/throughput.csv
    python benchmark/throughput.py --stage 1 --implementations ours --heads 5 --lengths 2048 --data_path chats.jsonl \\
        --tokenizer meta-llama/Meta-Llama-3-8B-Instruct --out benchmark/results/throughput.csv

LLaMA-3-8B shapes. Weights and AdamW's moments are in bf16 (--dtype bfloat16), or an 8B model would not fit on one GPU.
Weights and tokens are random, and every token is a target. A run has --warmup steps, then --steps that count.
EfficiencyCallback measures the time. All implementations start from the same weights; if their losses and gradient
norms differ, the work was not the same, and the script ends with an error. Where memory runs out, the row says OOM.

ceiling_tflops is a bf16 product of two 8192 x 8192 matrices, the median of 30 on a cool GPU. sustained_tflops is the
same after two seconds of such products, when the GPU has reached its power limit, as in training.

With --stored_states there is no backbone: random hidden states are read from a file as --states_path reads them. With
--data_path, the script compares forms of real conversations: padded to --lengths, grouped by length, packed.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import setting
import torch
from profiled import Trace
from transformers import PrinterCallback

from callback import EfficiencyCallback, FlopCount
from conversations.batches import Collator
from conversations.rows import prepare
from conversations.sources import load_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate
from conversations.tokenizer import load_stops, load_tokenizer
from model.bits import BITS
from model.path_heads import HEAD_TYPES
from training.arguments import TrainingArguments

LIMIT = "fail where torch would take more: so a large GPU acts as a small one (a CUDA context takes 0.5 GiB more)"
OPTIM = "adamw_torch_fused"  # train.py's default
# The largest relative difference in bf16 between implementations that do the same work. The last loss depends on all
# earlier gradients; without a head's gradient it would stay at ln(128256) = 11.8.
TOLERANCE = {"first_loss": 2e-3, "grad_norm": 3e-2, "last_loss": 5e-2}


def ceilings(device: torch.device) -> dict[str, str]:
    """TFLOP/s of a large bf16 product, cool and under sustained load."""
    if device.type != "cuda":
        return {"ceiling_tflops": "", "sustained_tflops": ""}
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def rate(seconds: float) -> float:
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < 30 or time.perf_counter() - start < seconds:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            a @ b
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        return 2 * n**3 / sorted(times[-30:])[15] / 1e9

    rate(0)  # loads the kernel
    time.sleep(2)
    return {"ceiling_tflops": f"{rate(0):.1f}", "sustained_tflops": f"{rate(2):.1f}"}


def train(options, implementation: str, heads: int, length: int, recomputed: int, data: str, rows, device) -> dict:
    """One run -> the figures of its row."""
    steps = options.warmup + options.steps
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        medusa_only_heads=options.stage == 1,
        bf16=True,
        per_device_train_batch_size=options.batch_size,
        max_steps=steps,
        learning_rate=options.learning_rate,
        optim=options.optim,
        optim_args=options.optim_args,
        gradient_checkpointing=recomputed > 0,
        gradient_checkpointing_layers=recomputed or None,
        train_sampling_strategy="random" if options.data_path else "sequential",
        logging_first_step=True,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0 if data == "random" else 4,
    )
    draft, kind, shape = options.medusa_vocab_size, options.medusa_head_type, options.shape
    shape = shape | {"num_hidden_layers": 0} if data == "stored states" else shape
    dtype, bits = getattr(torch, options.dtype), options.backbone_dtype
    model = setting.random_model(shape, heads, options.stage, dtype, device, draft, kind, bits=bits)
    setting.choose_implementation(model, implementation, device, varlen=data == "packed varlen")
    torch.cuda.empty_cache()  # of what was there before it was in few bits
    meter = EfficiencyCallback(FlopCount.of(model), device, warmup_steps=options.warmup)
    trainer = setting.trainer_class(implementation)(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collator(0, pad_to=length if data == "padded" else None),
        meter=meter,
    )
    if options.trace:
        name = f"stage{options.stage}_{implementation}_{heads}_heads_{length}.txt"
        trainer.add_callback(Trace(options.warmup, options.trace / name))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    first, last = (entry for entry in trainer.state.log_history if "loss" in entry)
    figures = meter.summary()
    return {
        "step_time_s": f"{figures['step_time_s']:.4f}",
        "tokens_per_s": f"{figures['tokens_per_s']:.0f}",
        "rows_per_s": f"{figures['rows_per_s']:.0f}",
        "useful_tflops": f"{figures['useful_tflops']:.1f}",
        "mfu": f"{figures['mfu']:.4f}" if "mfu" in figures else "",
        "peak_gib": f"{figures['peak_allocated_gib']:.2f}" if device.type == "cuda" else "",
        "reserved_gib": f"{figures['peak_reserved_gib']:.2f}" if device.type == "cuda" else "",
        "first_loss": f"{first['loss']:.5f}",
        "last_loss": f"{last['loss']:.5f}",
        "grad_norm": f"{first['grad_norm']:.5f}",
    }


FIGURES = (
    *("step_time_s", "tokens_per_s", "rows_per_s", "useful_tflops", "mfu"),
    *("peak_gib", "reserved_gib", "first_loss", "last_loss", "grad_norm"),
)
OOM = dict.fromkeys(FIGURES, "") | dict.fromkeys(("step_time_s", "tokens_per_s", "peak_gib"), "OOM")


def described(options) -> str:
    """What a row's `options` says: all that is not as it always was."""
    bits, optim = options.backbone_dtype, options.optim
    parts = [f"{bits} backbone"] * bool(bits) + [optim] * (optim != OPTIM) + [options.optim_args or ""]
    parts += [options.dtype] * (options.dtype != "bfloat16")
    parts += [] if options.limit_gib is None else [f"at most {options.limit_gib:g} GiB"]
    return ", ".join(filter(None, parts))


def differences(rows: list[dict]) -> list[str]:
    """A sentence for each figure that differs too much between rows that differ only in the implementation."""
    problems: list[str] = []
    first: dict[tuple, dict] = {}
    for row in rows:
        if row["step_time_s"] == "OOM" or row["data"] != "random":
            continue
        want = first.setdefault((row["heads"], row["length"]), row)
        for name, tolerance in TOLERANCE.items():
            a, b = float(row[name]), float(want[name])
            if not abs(a - b) <= tolerance * abs(b):
                who = f"{row['implementation']} ({row['options']})", want["implementation"]
                problems.append(
                    f"{row['heads']} heads, {row['length']} tokens: {name} {a} of {who[0]}, {b} of {who[1]}"
                )
    return problems


def random_tokens(options, length: int) -> dict:
    """name -> rows, as `conversations`, but with one entry: the same batch in each step, so that losses fall."""
    batch = setting.random_rows(options.shape, length, options.batch_size, options.medusa_vocab_size)
    rows = batch * (options.warmup + options.steps)
    if not options.stored_states:
        return {"random": rows}
    directory = options.stored_states / str(length)
    directory.mkdir()
    return {"stored states": setting.stored_rows(options.shape, rows, directory)}


def conversations(options, length: int) -> dict:
    """name -> dataset of real conversations, one for each way to make batches of them."""
    chat = ChatTemplate(load_tokenizer(options.tokenizer, options.chat_template), load_stops(options.tokenizer))
    data = load_conversations(options.data_path)
    data = data.shuffle(seed=0).select(range(min(options.conversations, len(data))))
    limits = {"max_length": length, "min_length": max(options.heads) + 2}
    rows = prepare(data, Summary(options.data_path, len(data)), chat, **limits)
    packed = prepare(data, Summary(options.data_path, len(data)), chat, packing=True, **limits)
    # Rows that know their length are grouped by it. On a GPU packed ones run with a mask and without.
    varlen = {"packed varlen": packed} if torch.cuda.is_available() else {}
    return {"padded": rows.remove_columns("length"), "grouped": rows, "packed": packed} | varlen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument(
        "--implementations", nargs="+", choices=setting.IMPLEMENTATIONS, default=setting.IMPLEMENTATIONS
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1024 2048 4096 8192; --smoke: 32 64")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    layers_help = "stage 2, ours: --gradient_checkpointing_layers for each of --lengths (default: all layers; 0: none)"
    parser.add_argument("--recomputed_layers", type=int, nargs="+", help=layers_help)
    parser.add_argument("--medusa_vocab_size", type=int, help="heads guess so many tokens (default: all)")
    parser.add_argument("--medusa_head_type", choices=HEAD_TYPES, default="medusa")
    parser.add_argument("--backbone_dtype", choices=BITS, help="stage 1: as train.py's flag")
    parser.add_argument(
        "--fp8_backbone", dest="backbone_dtype", action="store_const", const="fp8", help="--backbone_dtype fp8"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of trained weights")
    parser.add_argument("--optim", default=OPTIM, help="as train.py's flag")
    parser.add_argument("--optim_args", help="as train.py's flag")
    parser.add_argument("--limit_gib", type=float, help=LIMIT)
    parser.add_argument("--stored_states", type=Path, help="stage 1: the directory to keep hidden states in meanwhile")
    parser.add_argument("--data_path", help="real conversations instead of random tokens")
    parser.add_argument("--tokenizer", help="for --data_path: a Hub id or a directory")
    parser.add_argument("--chat_template", help="for a tokenizer without one")
    parser.add_argument("--conversations", type=int, default=2000, help="of --data_path, drawn at random")
    parser.add_argument("--trace", type=Path, help="directory for a profile of two steps of each run: it slows them")
    parser.add_argument("--smoke", action="store_true", help="a model of 30,000 weights, to try the script itself")
    parser.add_argument("--out", type=Path, required=True, help="CSV to append to")
    options = parser.parse_args()
    setting.set_sizes(options)
    if bool(options.data_path) != bool(options.tokenizer):
        parser.error("--data_path and --tokenizer go together")
    if options.data_path and options.medusa_vocab_size:
        parser.error("--medusa_vocab_size takes any tokens, not those of --data_path: leave one of them out")
    if options.backbone_dtype and options.stage == 2:
        parser.error("--backbone_dtype is for a frozen backbone: --stage 1")
    if options.stored_states and (options.stage == 2 or options.implementations != ["ours"] or options.data_path):
        parser.error("--stored_states is for --stage 1 --implementations ours, without --data_path")
    if options.stored_states and not options.stored_states.is_dir():
        parser.error(f"there is no directory --stored_states {options.stored_states}")
    if options.trace and not torch.cuda.is_available():
        parser.error("--trace needs a GPU")
    layers, count = options.shape["num_hidden_layers"], len(options.lengths)
    options.recomputed_layers = options.recomputed_layers or [layers] * count
    if len(options.recomputed_layers) != count:
        parser.error("--recomputed_layers needs one number for each of --lengths")
    if options.trace:
        options.trace.mkdir(parents=True, exist_ok=True)
    setting.limit_memory(options.limit_gib, parser)
    with tempfile.TemporaryDirectory(dir=options.stored_states) as directory:
        options.stored_states = options.stored_states and Path(directory)
        measure(options)


def measure(options):
    """Appends a row for each run to the CSV. Raises SystemExit if they did not do the same work."""
    layers = options.shape["num_hidden_layers"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everywhere = ceilings(device) | {"steps": options.steps} | setting.origin()
    make = conversations if options.data_path else random_tokens
    sets, measured = {length: make(options, length) for length in options.lengths}, []
    for implementation in options.implementations:
        for heads in options.heads:
            for length, some in zip(options.lengths, options.recomputed_layers, strict=True):
                recomputed = 0 if options.stage == 1 else some if implementation == "ours" else layers
                for data, rows in sets[length].items():
                    try:
                        figures = train(options, implementation, heads, length, recomputed, data, rows, device)
                    except torch.OutOfMemoryError:
                        figures = OOM
                    gc.collect()
                    torch.cuda.empty_cache()
                    what = described(options)
                    if options.stage == 2:
                        what = ", ".join([f"{recomputed} of {layers} layers recomputed", *filter(None, [what])])
                    row = {"stage": options.stage, "heads": heads, "batch_size": options.batch_size, "length": length}
                    row |= {"medusa_vocab_size": options.medusa_vocab_size or "", "data": data}
                    row |= {"head_type": options.medusa_head_type, "implementation": implementation, "options": what}
                    row |= figures | everywhere
                    setting.append(options.out, row)
                    measured.append(row)
                    keys = ("heads", "length", "data", "implementation", "options", "step_time_s", "useful_tflops")
                    print(*(row[key] for key in keys), row["peak_gib"], flush=True)
                if figures is OOM:
                    break  # longer ones need more
    if problems := differences(measured):
        raise SystemExit("not the same work:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
