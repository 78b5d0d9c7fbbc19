"""One head's distance from the backbone's own distribution, without all logits in memory.

The teacher of head k at position t is what the `lm_head` says at t + k, where it guesses the same token. Both logits
are products of hidden states with a `[V, H]` matrix. As in `model/loss.py`, rows go in chunks, and while a chunk's two
matrices of logits exist, its loss and its gradients are computed. q is the head's distribution, p the teacher's:

  kl  KL(p || q) = sum p (log p - log q). Its gradient with respect to the head's logits is q - p.
  lk  w KL(p || q) + (1 - w) (1 - a) with the share of guesses that sampling would accept, a = sum min(p, q), and
      w = exp(-3 a), taken as a constant (arXiv 2602.23881, its adaptive form): KL as long as they have little in
      common, where 1 - a has almost no gradient, and then more and more what decoding is paid by. The gradient of
      -a is -q (c - sum q c), c being 1 where q < p and else 0.

Four products of rows x V x H are needed (cross-entropy: three). Three implementations, as in `model/loss.py`: a Triton
kernel (impl `liger`), plain torch in chunks, and plain torch with all logits, the reference.
"""

import torch
import triton
import triton.language as tl

from model import loss as head_loss

KINDS = ("kl", "lk")
ETA = 3.0  # of lk; the paper's choice
BLOCK, WARPS = 4096, 8
Teacher = tuple[torch.Tensor, torch.Tensor]  # hidden states `[R, H]`, and the `[V, H]` matrix of the lm_head


def linear_teacher_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: Teacher,
    targets: torch.Tensor,
    kind: str,
    impl: str,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed distance of softmax(hidden @ weight.T) from softmax(teacher's), and how many rows guess `targets` `[R]`.

    hidden `[R, H]`, weight `[V, H]`; the teacher gets no gradient. Returns an fp32 scalar and an int64 scalar. Dtypes,
    autocast and softcap as in `linear_cross_entropy`.
    """
    dtype = head_loss.compute_dtype(hidden, weight)
    hidden, weight = head_loss.prepare(hidden, weight, dtype)
    teacher_hidden, teacher_weight = (tensor.detach().to(dtype) for tensor in teacher)
    if impl == "torch" or len(targets) == 0:
        z, y = (capped(x @ w.t(), softcap) for x, w in ((hidden, weight), (teacher_hidden, teacher_weight)))
        return reference(z, y, kind).sum(), (z.argmax(-1) == targets).sum()
    on_gpu = hidden.device.type == "cuda"
    chunk = head_loss.CHUNK_ROWS if on_gpu or impl == "liger" else head_loss.CHUNK_ROWS_CPU
    step = in_triton if impl == "liger" else in_torch
    return _Chunked.apply(hidden, weight, teacher_hidden, teacher_weight, targets, kind, softcap, chunk, step)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """In fp32 (or more)."""
    return head_loss.cap(logits if logits.dtype == torch.float64 else logits.float(), softcap)


def reference(z: torch.Tensor, y: torch.Tensor, kind: str) -> torch.Tensor:
    """`[R]` from the logits of head (z) and teacher (y) `[R, V]`."""
    log_q, log_p = z.log_softmax(-1), y.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "kl":
        return kl
    accepted = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    share = torch.exp(-ETA * accepted.detach())
    return share * kl + (1 - share) * (1 - accepted)


def in_torch(z: torch.Tensor, y: torch.Tensor, kind: str, softcap: float | None):
    """-> loss `[R]`, best token `[R]`, gradient `[R, V]`, of raw logits `[R, V]`."""
    dtype, raw = z.dtype, z.float()
    z, y = capped(z, softcap), capped(y, softcap)
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    best, loss = raw.argmax(-1), reference(z, y, kind)
    q, p = z.softmax(-1), y.softmax(-1)
    grad = q - p
    if kind == "lk":
        share = torch.exp(-ETA * torch.minimum(p, q).sum(-1, keepdim=True))
        below = (q < p).float()
        grad = share * grad - (1 - share) * q * (below - (q * below).sum(-1, keepdim=True))
    return loss, best, (grad if slope is None else grad * slope).to(dtype)


@triton.jit
def _capped(z, SOFTCAP: tl.constexpr):
    if SOFTCAP > 0:
        z = SOFTCAP * (2 * tl.sigmoid(2 * z / SOFTCAP) - 1)  # tanh(x) = 2 sigmoid(2 x) - 1
    return z


@triton.jit
def _rows(
    z_ptr,
    y_ptr,
    loss_ptr,
    best_ptr,
    vocab,
    z_row,
    y_row,
    LK: tl.constexpr,
    ETA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. Reads both logits twice (lk: three times); the gradient takes the place of the head's."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr, y_ptr = z_ptr + row * z_row, y_ptr + row * y_row
    z_max, z_sum, y_max, y_sum = -float("inf"), 0.0, -float("inf"), 0.0
    best, best_at = -float("inf"), 0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        raw = tl.load(z_ptr + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        top = tl.max(raw)
        best_at = tl.where(top > best, start + tl.argmax(raw, 0), best_at)
        best = tl.maximum(best, top)
        z = tl.where(at < vocab, _capped(raw, SOFTCAP), -float("inf"))
        y = tl.load(y_ptr + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        y = tl.where(at < vocab, _capped(y, SOFTCAP), -float("inf"))
        new = tl.maximum(z_max, tl.max(z))
        z_sum = z_sum * tl.exp(z_max - new) + tl.sum(tl.exp(z - new))
        z_max = new
        new = tl.maximum(y_max, tl.max(y))
        y_sum = y_sum * tl.exp(y_max - new) + tl.sum(tl.exp(y - new))
        y_max = new
    z_log, y_log = z_max + tl.log(z_sum), y_max + tl.log(y_sum)
    kl, accepted, below_sum = 0.0, 0.0, 0.0
    if LK:
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocab
            log_q = _capped(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32), SOFTCAP) - z_log
            log_p = _capped(tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32), SOFTCAP) - y_log
            q, p = tl.where(inside, tl.exp(log_q), 0.0), tl.where(inside, tl.exp(log_p), 0.0)
            kl += tl.sum(p * (log_p - log_q))
            accepted += tl.sum(tl.minimum(p, q))
            below_sum += tl.sum(tl.where(q < p, q, 0.0))
    share = tl.exp(-ETA * accepted) if LK else 1.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        z = _capped(tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32), SOFTCAP)
        log_q = z - z_log
        log_p = _capped(tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32), SOFTCAP) - y_log
        q, p = tl.where(inside, tl.exp(log_q), 0.0), tl.where(inside, tl.exp(log_p), 0.0)
        grad = q - p
        if LK:
            grad = share * grad - (1 - share) * q * (tl.where(q < p, 1.0, 0.0) - below_sum)
        else:
            kl += tl.sum(p * (log_p - log_q))
        if SOFTCAP > 0:
            grad = grad * (1 - (z / SOFTCAP) * (z / SOFTCAP))
        tl.store(z_ptr + at, grad.to(z_ptr.dtype.element_ty), mask=inside)
    loss = share * kl + (1 - share) * (1 - accepted) if LK else kl
    tl.store(loss_ptr + row, loss)
    tl.store(best_ptr + row, best_at)


def in_triton(z: torch.Tensor, y: torch.Tensor, kind: str, softcap: float | None):
    """The same; the gradient is in the memory of z."""
    rows, vocab = z.shape
    loss = torch.empty(rows, dtype=torch.float32, device=z.device)
    best = torch.empty(rows, dtype=torch.int64, device=z.device)
    block = min(triton.next_power_of_2(vocab), BLOCK)
    _rows[(rows,)](
        z, y, loss, best, vocab, z.stride(0), y.stride(0),
        LK=kind == "lk", ETA=ETA, SOFTCAP=softcap or 0.0, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return loss, best, z


class _Chunked(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, targets, kind, softcap, chunk, step):
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_weight = torch.zeros_like(weight) if weight.requires_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        # Two matrices for all chunks: new ones would be there before the old ones are gone.
        z, y = (hidden.new_empty(min(chunk, len(targets)), len(weight)) for _ in range(2))
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            x = hidden[rows]
            torch.mm(x, weight.t(), out=z[: len(x)])
            torch.mm(teacher_hidden[rows], teacher_weight.t(), out=y[: len(x)])
            each, best, grad = step(z[: len(x)], y[: len(x)], kind, softcap)
            loss += each.sum()
            correct += (best == targets[rows]).sum()
            if d_hidden is not None:
                d_hidden[rows] = grad @ weight
            if d_weight is not None:
                d_weight.addmm_(grad.t(), x)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        return *head_loss.scale_gradients(ctx, grad_loss), *[None] * 7
