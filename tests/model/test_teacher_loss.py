"""model/teacher_loss.py: three implementations, one answer, and the gradient of autograd."""

import pytest
import torch

from model.teacher_loss import KINDS, linear_teacher_loss, reference

TRITON = pytest.param("liger", marks=pytest.mark.interpreter)  # on the CPU; on a GPU `gpu` says so


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def make(device, dtype=torch.float32, rows=53, vocab=130, size=32):
    shapes = ((rows, size), (vocab, size), (rows, size), (vocab, size))
    tensors = [torch.randn(shape, device=device).to(dtype) * 0.7 for shape in shapes]
    return tensors, torch.randint(vocab, (rows,), device=device)


def run(impl, tensors, targets, kind, softcap=None, scale=1.0):
    """-> loss, correct, d_hidden, d_weight; the loss scaled, as the trainer does it."""
    hidden, weight, *teacher = (tensor.clone().requires_grad_() for tensor in tensors)
    loss, correct = linear_teacher_loss(hidden, weight, tuple(teacher), targets, kind, impl, softcap)
    (loss * scale).backward()
    assert all(tensor.grad is None for tensor in teacher)
    return loss.detach(), correct, hidden.grad, weight.grad


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("impl", [TRITON, "chunked", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_equals_autograd_in_float64(impl, dtype, tolerance, softcap, kind, device, monkeypatch):
    monkeypatch.setattr("model.loss.CHUNK_ROWS", 16)  # several chunks, the last one not full
    monkeypatch.setattr("model.loss.CHUNK_ROWS_CPU", 16)
    tensors, targets = make(device, dtype)
    loss, correct, d_hidden, d_weight = run(impl, tensors, targets, kind, softcap, scale=0.37)
    doubles = [tensor.double() for tensor in tensors]
    want, right, want_hidden, want_weight = run("torch", doubles, targets, kind, softcap, scale=0.37)
    assert relative(loss, want) < tolerance
    assert relative(d_hidden, want_hidden) < tolerance
    assert relative(d_weight, want_weight) < tolerance
    assert d_weight.dtype == dtype and loss.dtype == torch.float32
    assert abs(correct.item() - right.item()) <= (0 if dtype == torch.float32 else 2)


def test_the_reference_is_what_the_names_say():
    z, y = torch.randn(7, 20, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
    p, q = y.softmax(-1), z.softmax(-1)
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    torch.testing.assert_close(reference(z, y, "kl"), kl)
    accepted = 1 - 0.5 * (p - q).abs().sum(-1)  # one minus the total variation
    share = torch.exp(-3 * accepted)
    torch.testing.assert_close(reference(z, y, "lk"), share * kl + (1 - share) * (1 - accepted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [TRITON, "chunked", "torch"])
def test_a_head_that_says_what_the_teacher_says_has_nothing_to_learn(impl, kind, device):
    (hidden, weight, *_), targets = make(device)
    loss, _, d_hidden, d_weight = run(impl, [hidden, weight, hidden, weight], targets, kind)
    assert abs(loss.item()) < 1e-4 and max(d_hidden.abs().max(), d_weight.abs().max()) < 1e-4


@pytest.mark.parametrize("impl", [TRITON, "chunked"])
def test_chunk_size_does_not_matter(impl, device, monkeypatch):
    (tensors, targets), results = make(device), []
    for rows in (8, 64):
        monkeypatch.setattr("model.loss.CHUNK_ROWS", rows)
        monkeypatch.setattr("model.loss.CHUNK_ROWS_CPU", rows)
        results.append(run(impl, tensors, targets, "lk"))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [TRITON, "chunked", "torch"])
def test_no_rows_are_zero_loss_and_zero_gradients(impl, device):
    (hidden, weight, y, w), targets = make(device)
    loss, correct, d_hidden, d_weight = run(impl, [hidden[:0], weight, y[:0], w], targets[:0], "kl")
    assert loss == 0 and correct == 0 and d_hidden.shape == (0, 32) and not d_weight.any()


@pytest.mark.parametrize("impl", [TRITON, "chunked"])
def test_large_logits_and_a_vocabulary_of_several_blocks(impl, device):
    tensors, targets = make(device, rows=5, vocab=5000)
    tensors = [tensor * 6 for tensor in tensors]
    found, want = (run(way, tensors, targets, "lk") for way in (impl, "torch"))
    for a, b in zip(found, want, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
