"""Cross-entropy of one head, from hidden states and projection weight, without all of its logits in memory.

For 4 x 8192 tokens and LLaMA-3's vocabulary of 128,256, the logits of one head are 4 * 8192 * 128256 * 2 bytes =
8.4 GB in bf16, twice that in fp32, and there are K + 1 heads. But a row's logits are needed only for its loss and its
gradient. So rows are processed in chunks, and only d_hidden and d_weight are kept.

Three implementations (`impl`) compute the same numbers:
  liger    Liger's fused linear cross-entropy Triton kernel: runs on a GPU.
  chunked  the same idea in plain torch: runs where Triton does not.
  torch    all logits at once: the reference for tests of the other two, and `--use_liger False`.
"""

import logging
import os

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

# Rows whose logits exist at once: 2048 x 128256 x 2 bytes = 0.5 GB. Every chunk reads and writes the [vocab, hidden]
# weight gradient; below about 1000 rows that costs more than the product itself. On an H100, with hidden size 4096,
# 4096 rows take 62.0 ms in Liger's default chunks of 128 rows and 20.0 ms in chunks of 2048.
CHUNK_ROWS = 2048
# A CPU gains nothing from more than a few hundred rows, and fp32 logits (for the softmax) take twice the memory.
CHUNK_ROWS_CPU = 512


def choose_impl(use_liger: bool, device: torch.device) -> str:
    """Which implementation runs for `--use_liger` on `device`; says so, and why, in one log line."""
    if not use_liger:
        impl, why = "torch", "--use_liger False: plain torch, all logits of a head in memory"
    elif device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        impl, why = "liger", f"Liger's fused linear cross-entropy, {CHUNK_ROWS} rows at a time"
    else:
        impl, why = "chunked", f"no GPU for Liger's Triton kernel: plain torch, {CHUNK_ROWS_CPU} rows at a time"
    logger.info("head loss: %s (%s)", impl, why)
    return impl


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    impl: str,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of `hidden @ weight.T` against `targets`, and how many rows are right (top-1).

    hidden `[R, H]`, weight `[V, H]`, targets `[R]` without IGNORE: drop those rows first, or Liger would multiply them
    too. Returns an fp32 scalar and an int64 scalar. The loss is a sum, because the mean over an optimiser step needs
    the row count of all its micro-batches and ranks. Computes in the autocast dtype if autocast is on, else in the
    dtype of `weight`. `softcap` is Gemma 2's: softcap * tanh(logits / softcap).
    """
    device = hidden.device.type
    hidden, weight = prepare(hidden, weight, compute_dtype(hidden, weight))
    if impl == "torch" or len(targets) == 0:  # without rows, torch's empty product gives loss 0 and zero gradients
        return _torch(hidden, weight, targets, softcap)
    if impl == "chunked":
        chunk = CHUNK_ROWS if device == "cuda" else CHUNK_ROWS_CPU
        return _Chunked.apply(hidden, weight, targets, softcap, chunk)
    if impl == "liger":
        return _liger(hidden, weight, targets, softcap)
    raise ValueError(f"unknown loss implementation {impl!r}: use liger, chunked or torch")


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def prepare(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in this dtype, and with or without gradients as the kernels need it."""
    if not torch.is_grad_enabled():  # detached, or the kernels would compute gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    elif weight.requires_grad and not hidden.requires_grad:
        # liger-kernel 0.8.5 computes no weight gradient for an input that does not require grad: on a frozen backbone
        # a head without ResBlocks would learn nothing, silently.
        hidden = hidden.detach().requires_grad_()
    return hidden.to(dtype), weight.to(dtype)


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma 2's bound on the logits. softcap is None for other models: nothing changes."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def scale_gradients(ctx, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """d_hidden and d_weight that a forward pass has saved, in place: autograd refuses a second backward."""
    d_hidden, d_weight = ctx.saved_tensors
    for grad in (d_hidden, d_weight):
        if grad is not None:
            grad.mul_(grad_loss)
    return d_hidden, d_weight


def _torch(hidden, weight, targets, softcap):
    logits = cap(F.linear(hidden, weight).float(), softcap)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.argmax(-1) == targets).sum()


def chunk_mem_const(rows: int, vocab_size: int, hidden_size: int, chunk_rows: int) -> int:
    """The C with which Liger makes chunks of at most `chunk_rows` rows (a power of two).

    Liger cuts R rows into ceil(V / (C * H)) chunks and rounds the rows of a chunk up to a power of two. We need
    n = ceil(R / chunk_rows) chunks or more, so C = floor(V / (n * H)). C cannot be below 1: where V / H is small
    (32000 / 4096) and R large, we get Liger's default, C = 1, whose chunks of logits have about R * H elements.
    """
    chunks = -(-rows // chunk_rows)
    return max(1, vocab_size // (chunks * hidden_size))


def _liger(hidden, weight, targets, softcap):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    vocab_size, hidden_size = weight.shape
    out = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        reduction="sum",
        softcap=softcap,
        return_predicted_tokens=True,
        chunk_mem_const=chunk_mem_const(len(targets), vocab_size, hidden_size, CHUNK_ROWS),
    )
    return out.loss, (out.predicted_tokens == targets).sum()


class _Chunked(torch.autograd.Function):
    """Like Liger, computes the gradients in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, chunk):
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_weight = torch.zeros_like(weight) if weight.requires_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(targets), chunk):
            x, t = hidden[start : start + chunk], targets[start : start + chunk]
            logits = cap((x @ weight.t()).float(), softcap)
            row = torch.arange(len(t), device=t.device)
            log_z = logits.logsumexp(-1, keepdim=True)
            loss += (log_z[:, 0] - logits[row, t]).sum()
            correct += (logits.argmax(-1) == t).sum()
            if d_hidden is None and d_weight is None:
                continue
            slope = None if softcap is None else 1 - (logits / softcap) ** 2
            grad = logits.sub_(log_z).exp_()  # softmax - one-hot is the gradient with respect to the logits
            grad[row, t] -= 1
            grad = (grad if slope is None else grad * slope).to(x.dtype)
            if d_hidden is not None:
                d_hidden[start : start + chunk] = grad @ weight
            if d_weight is not None:
                d_weight.addmm_(grad.t(), x)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        return *scale_gradients(ctx, grad_loss), None, None, None
