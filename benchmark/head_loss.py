"""One head's loss alone, forward and backward, at LLaMA-3-8B's sizes: what chunks of rows cost and save.

    python benchmark/head_loss.py --out benchmark/results/head_loss.csv

hidden `[rows, 4096]`, weight `[128256, 4096]`, bf16; every row has a target. Compares plain torch with all logits,
Liger's kernel with its own chunks and with larger ones, and plain torch in chunks (`impl` of model/loss.py). For kl
also Liger's distillation loss, which is the same with jsd_beta 0; its chunks cannot be chosen.

    ms           median time of --repeats passes
    tflops       TFLOP/s of the products that are needed, 6 x rows x V x H (8 with a teacher, --losses kl lk)
    extra_gib    peak GiB on top of the inputs; the two gradients alone are more than 1. OOM: memory ran out
    loss_error, grad_error   ||a - b|| / ||b|| against plain torch in fp32; the larger of the two gradients' errors

An error above 2 % ends the run: what computes something else is not timed.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from liger_kernel.transformers.functional import liger_fused_linear_jsd
from setting import CHUNK_ROWS, LLAMA3_8B, TINY, append, origin

import model.loss
from callback import GIB
from model.loss import choose_impl, chunk_mem_const, linear_cross_entropy
from model.teacher_loss import KINDS, linear_teacher_loss

ROWS, CHUNKS = (4096, 8192, 16384), (1024, 2048, 4096, 8192)
SMOKE_ROWS, SMOKE_CHUNKS = (64, 128), (16, 32)
ERROR_LIMIT = 2e-2
WARM_UPS = 3
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(shape: dict, rows: int, device: torch.device) -> Inputs:
    """hidden `[R, H]` and weight `[V, H]` in bf16, targets `[R]`. The logits have mean 0 and deviation 1."""
    generator = torch.Generator(device).manual_seed(0)
    vocab, size = shape["vocab_size"], shape["hidden_size"]
    hidden = torch.randn(rows, size, generator=generator, device=device).bfloat16()
    weight = (torch.randn(vocab, size, generator=generator, device=device) * size**-0.5).bfloat16()
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def forward_backward(hidden, weight, targets, impl: str, kind: str = "ce") -> list[torch.Tensor]:
    """Summed loss, d_hidden, d_weight. kind: kl and lk have a teacher made of the same numbers in another order."""
    if kind == "ce":
        loss, _ = linear_cross_entropy(hidden, weight, targets, impl)
    else:
        teacher = (hidden.detach().flip(-1), weight.detach())
    if impl == "jsd":  # a mean over the rows
        loss = liger_fused_linear_jsd(hidden, weight, *teacher, jsd_beta=0.0) * len(hidden)
    elif kind != "ce":
        loss, _ = linear_teacher_loss(hidden, weight, teacher, targets, kind, impl)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def reference(hidden, weight, targets, kind: str = "ce") -> list[torch.Tensor]:
    """The same by plain torch in fp32. In parts: all logits of 16,384 rows and their gradients would take 24 GiB."""
    hidden, weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    loss, d_hidden, d_weight = torch.zeros((), device=hidden.device), [], torch.zeros_like(weight)
    for rows in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        part = forward_backward(rows[0], weight, rows[1], "torch", kind)
        loss += part[0]
        d_hidden.append(part[1])
        d_weight += part[2]
    return [loss, torch.cat(d_hidden), d_weight]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found.float() - expected) / torch.linalg.vector_norm(expected)).item()


def liger_chunk(asked: int, rows: int, shape: dict) -> int:
    """The rows in a chunk of Liger's if CHUNK_ROWS is `asked`: first model/loss.py's arithmetic, then Liger's."""
    vocab, size = shape["vocab_size"], shape["hidden_size"]
    chunks = -(-vocab // (chunk_mem_const(rows, vocab, size, asked) * size))
    return min(rows, 2 ** (-(-rows // chunks) - 1).bit_length())


def candidates(kind: str, rows: int, shape: dict, sizes: tuple[int, ...], device: torch.device):
    """Yields name, `impl`, the value CHUNK_ROWS must have, and the rows in a chunk."""
    yield "torch, all logits", "torch", rows, rows
    if choose_impl(True, device) == "liger":
        if kind == "ce":  # the teacher's kernel takes any chunk
            yield "liger, default chunks", "liger", 1, liger_chunk(1, rows, shape)
        for size in sizes:
            if liger_chunk(size, rows, shape) == size:  # else Liger would choose another size
                yield f"liger, {size} rows a chunk", "liger", size, size
        if kind == "kl":
            yield "liger_fused_linear_jsd", "jsd", 1, liger_chunk(1, rows, shape)
    else:
        print("liger skipped: it needs a GPU, or TRITON_INTERPRET=1")
    yield f"chunked plain torch, {CHUNK_ROWS}", "chunked", CHUNK_ROWS, min(rows, CHUNK_ROWS)


def now(cuda: bool):
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(inputs: Inputs, impl: str, kind: str, repeats: int) -> tuple[float, float]:
    """Median milliseconds of one pass, and its peak GiB on top of what was there (on a CPU: 0)."""
    cuda = inputs[0].is_cuda
    for _ in range(WARM_UPS):
        forward_backward(*inputs, impl, kind)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, marks = torch.cuda.memory_allocated(), [now(cuda)]
    for _ in range(repeats):
        forward_backward(*inputs, impl, kind)
        marks.append(now(cuda))
    if cuda:
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) if cuda else 1000 * (b - a) for a, b in itertools.pairwise(marks)]
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / GIB


def compare(inputs: Inputs, expected, impl: str, kind: str, repeats: int) -> dict:
    """The columns of one implementation. Raises SystemExit if it computes something else than `expected`."""
    found = forward_backward(*inputs, impl, kind)
    loss, *grads = (relative_error(*pair) for pair in zip(found, expected, strict=True))
    errors = {"loss_error": f"{loss:.1e}", "grad_error": f"{max(grads):.1e}"}
    if not all(error <= ERROR_LIMIT for error in (loss, *grads)):  # written so that NaN fails too
        sys.exit(f"{impl}, {len(inputs[0])} rows: not what plain torch computes in fp32, relative errors {errors}")
    ms, gib = measure(inputs, impl, kind, repeats)
    flops = (6 if kind == "ce" else 8) * len(inputs[0]) * inputs[1].numel()
    return {"ms": f"{ms:.2f}", "tflops": f"{flops / ms / 1e9:.1f}", "extra_gib": f"{gib:.2f}"} | errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--losses", nargs="+", choices=("ce", *KINDS), default=["ce"], help="of --medusa_loss")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script itself; needs no GPU")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        parser.error("there is no GPU: only --smoke runs without one")
    shape, source = TINY if options.smoke else LLAMA3_8B, origin()
    for rows in SMOKE_ROWS if options.smoke else ROWS:
        inputs = make_inputs(shape, rows, device)
        expected = {kind: reference(*inputs, kind) for kind in options.losses}
        sizes = SMOKE_CHUNKS if options.smoke else CHUNKS
        tries = [(kind, one) for kind in options.losses for one in candidates(kind, rows, shape, sizes, device)]
        for kind, (name, impl, asked, chunk) in tries:
            model.loss.CHUNK_ROWS = asked
            name = name if kind == "ce" else name.replace("liger,", "ours,")
            row = {"rows": rows, "loss": kind, "implementation": name, "chunk_rows": chunk}
            try:
                row |= compare(inputs, expected[kind], impl, kind, options.repeats)
            except torch.OutOfMemoryError:
                row |= {"ms": "", "tflops": "", "extra_gib": "OOM", "loss_error": "", "grad_error": ""}
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            if options.out:
                append(options.out, row | source)


if __name__ == "__main__":
    main()
