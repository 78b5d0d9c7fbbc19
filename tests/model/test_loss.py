"""model/loss.py: three implementations, one answer; rows that count; the silent case of Liger that must not happen."""

import logging

import pytest
import torch
import torch.nn.functional as F

from conversations.targets import IGNORE, count_rows, shifted_targets
from model.loss import choose_impl, linear_cross_entropy

LIGER = pytest.param("liger", marks=pytest.mark.interpreter)  # on the CPU; on a GPU `gpu` says so


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def run(impl, hidden, weight, targets, softcap=None, scale=1.0):
    """-> loss, correct, d_hidden, d_weight; the loss scaled, as the trainer does it."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, correct = linear_cross_entropy(hidden, weight, targets, impl, softcap)
    (loss * scale).backward()
    return loss.detach(), correct, hidden.grad, weight.grad


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("impl", [LIGER, "chunked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_equals_torch_in_float64(impl, dtype, tolerance, softcap, device, monkeypatch):
    if impl == "liger" and softcap is not None and device == "cpu":
        pytest.skip("Triton's interpreter passes softcap as a Python float, which Liger's kernel cannot take")
    monkeypatch.setattr("model.loss.CHUNK_ROWS", 16)  # several chunks, the last one not full
    monkeypatch.setattr("model.loss.CHUNK_ROWS_CPU", 16)
    hidden = torch.randn(53, 32, device=device).to(dtype)
    weight = torch.randn(130, 32, device=device).to(dtype)
    targets = torch.randint(130, (53,), device=device)
    loss, correct, d_hidden, d_weight = run(impl, hidden, weight, targets, softcap, scale=0.37)
    want, right, want_hidden, want_weight = run(
        "torch", hidden.double(), weight.double(), targets, softcap, scale=0.37
    )
    assert relative(loss, want) < tolerance
    assert relative(d_hidden, want_hidden) < tolerance
    assert relative(d_weight, want_weight) < tolerance
    assert d_weight.dtype == dtype and loss.dtype == torch.float32
    # bf16 logits tie now and then, so a row may go either way
    assert abs(correct.item() - right.item()) <= (0 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("impl", [LIGER, "chunked"])
def test_chunk_size_does_not_matter(impl, device, monkeypatch):
    hidden, weight = torch.randn(40, 16, device=device), torch.randn(70, 16, device=device)
    targets, results = torch.randint(70, (40,), device=device), []
    for rows in (8, 64):
        monkeypatch.setattr("model.loss.CHUNK_ROWS", rows)
        monkeypatch.setattr("model.loss.CHUNK_ROWS_CPU", rows)
        results.append(run(impl, hidden, weight, targets))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(4096, 128256, 4096), (9000, 49152, 576), (100, 300, 32)])
def test_liger_is_asked_for_chunks_of_2048_rows(rows, vocab, hidden, monkeypatch):
    """Follows Liger's own formula from the constant we hand it to the rows it will take at once."""
    asked = {}

    def fake(hidden, weight, targets, **kwargs):
        asked.update(kwargs)
        return type("Out", (), {"loss": hidden.sum(), "predicted_tokens": targets})

    monkeypatch.setattr("liger_kernel.transformers.functional.liger_fused_linear_cross_entropy", fake)
    one = torch.zeros(1, 1)
    targets = torch.zeros(rows, dtype=torch.int64)
    linear_cross_entropy(one.expand(rows, hidden), one.expand(vocab, hidden), targets, "liger")  # no memory
    chunks = -(-vocab // (asked["chunk_mem_const"] * hidden))
    rows_at_once = min(2 ** (-(-rows // chunks) - 1).bit_length(), rows)
    assert min(2048, rows) / 2 <= rows_at_once <= 2048
    assert asked["reduction"] == "sum"


@pytest.mark.parametrize("impl", [LIGER, "chunked", "torch"])
def test_weight_gets_its_gradient_from_hidden_that_needs_none(impl, device):
    """Liger alone would leave weight.grad None: the head of a frozen backbone would never train."""
    hidden, targets = torch.randn(9, 16, device=device), torch.randint(30, (9,), device=device)
    weight = torch.randn(30, 16, device=device, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, targets, impl)
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), weight)[0]
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-4)
    assert hidden.grad is None


@pytest.mark.parametrize("impl", [LIGER, "chunked", "torch"])
def test_no_row_is_loss_zero_and_gradient_zero(impl, device):
    hidden, weight = torch.randn(0, 16, device=device), torch.randn(30, 16, device=device)
    loss, correct, d_hidden, d_weight = run(impl, hidden, weight, torch.empty(0, dtype=torch.int64, device=device))
    assert loss == 0 and correct == 0
    assert d_hidden.shape == (0, 16)
    assert torch.equal(d_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("impl", [LIGER, "chunked"])
def test_no_grad_gives_the_loss_alone(impl, device):
    weight = torch.randn(30, 16, device=device, requires_grad=True)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(
            torch.randn(9, 16, device=device), weight, torch.randint(30, (9,), device=device), impl
        )
    assert loss > 0 and not loss.requires_grad and weight.grad is None


@pytest.mark.parametrize("impl", [LIGER, "chunked", "torch"])
def test_autocast_computes_in_bf16_and_gives_fp32_gradients(impl, device):
    hidden, weight = torch.randn(33, 32, device=device), torch.randn(50, 32, device=device)
    targets = torch.randint(50, (33,), device=device)
    with torch.autocast(device, torch.bfloat16):
        loss, _, d_hidden, d_weight = run(impl, hidden, weight, targets)
    want, _, want_hidden, want_weight = run("torch", hidden, weight, targets)
    assert d_hidden.dtype == d_weight.dtype == torch.float32
    assert 0 < relative(loss, want) < 1e-2  # not the fp32 answer, but near it
    assert relative(d_hidden, want_hidden) < 1e-2 and relative(d_weight, want_weight) < 1e-2


def test_unknown_implementation():
    with pytest.raises(ValueError, match="flash"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64), "flash")


def test_shifted_targets():
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert shifted_targets(labels, 2).tolist() == [[3, 4, 5, IGNORE, IGNORE]]
    assert shifted_targets(labels, 9).tolist() == [[IGNORE] * 5]  # fewer tokens than the head looks ahead


def test_targets_stay_in_their_conversation():
    labels, position_ids = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert shifted_targets(labels, 1, position_ids).tolist() == [[2, 3, IGNORE, 5, 6, IGNORE]]
    assert shifted_targets(labels, 2, position_ids).tolist() == [[3, IGNORE, IGNORE, 6, IGNORE, IGNORE]]


def test_rows_are_counted_exactly():
    """2179 is 2176 in bf16: a count must not take the compute dtype."""
    targets = torch.zeros(3, 1000, dtype=torch.int64)
    targets.view(-1)[2179:] = IGNORE
    count = count_rows(targets)
    assert count.item() == 2179 and count.dtype == torch.int64


def test_the_choice_is_said(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert choose_impl(False, torch.device("cuda")) == "torch"
    assert choose_impl(True, torch.device("cuda")) == "liger"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_impl(True, torch.device("cpu")) == "chunked"
    assert [record.args[0] for record in caplog.records] == ["torch", "liger", "chunked"]
