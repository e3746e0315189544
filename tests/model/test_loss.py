"""The chunked loss against torch's cross entropy over all logits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.config import NoMemory
from model.local import LocalLinears
from model.loss import IGNORE, Columns, become_gradient, chunked_loss, columns_of, cross_entropy
from tests.compare import relative
from tests.model.small import VOCAB, batch_of, build, config_of, gradients

ROWS, WIDTH, PADDED, SCALE = 13, 8, 64, torch.tensor(1 / 37)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[2:5] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


COLUMNS = columns_of(LocalLinears(), PADDED, VOCAB)


def run(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 4) -> tuple[Tensor, Tensor]:
    return chunked_loss(hidden, weight, labels, SCALE, chunk=chunk, columns=COLUMNS)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(
        hidden @ weight[:VOCAB].T, labels, reduction="none", ignore_index=IGNORE
    )
    return losses.sum() * SCALE, losses


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_values_are_those_of_cross_entropy(chunk: int) -> None:
    (loss, losses), (expected, each) = run(*inputs(), chunk), plain(*inputs())
    assert relative(loss, expected) < 1e-14
    assert relative(losses, each) < 1e-14


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_gradients_are_those_of_cross_entropy_times_the_upstream_one(chunk: int) -> None:
    hidden, weight, labels = inputs()
    own = torch.autograd.grad(run(hidden, weight, labels, chunk)[0] * 3, (hidden, weight))
    expected = torch.autograd.grad(plain(hidden, weight, labels)[0] * 3, (hidden, weight))
    assert relative(own[0], expected[0]) < 1e-14
    assert relative(own[1], expected[1]) < 1e-14


def test_an_ignored_label_has_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = inputs()
    loss, losses = run(hidden, weight, labels)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert not losses[2:5].any()
    assert not dhidden[2:5].any()
    assert losses[5:].all()


@pytest.mark.parametrize("label", [VOCAB, PADDED, 10**6, -1])
def test_a_label_that_the_vocabulary_does_not_have_is_not_passed_over(label: int) -> None:
    hidden, weight, labels = inputs()
    labels[7] = label
    loss, losses = run(hidden, weight, labels)
    assert losses.isnan().nonzero().flatten().tolist() == [7]
    assert torch.autograd.grad(loss, weight)[0].isnan().any()


def test_all_labels_ignored_is_a_loss_of_zero() -> None:
    hidden, weight, labels = inputs()
    loss, _ = run(hidden, weight, torch.full_like(labels, IGNORE))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert not grads[0].any() and not grads[1].any()


def test_padding_of_the_vocabulary_takes_no_probability() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        weight[VOCAB:] = 100.0
    loss, losses = run(hidden, weight, labels)
    assert relative(losses, plain(hidden, weight, labels)[1]) < 1e-14
    assert not torch.autograd.grad(loss, weight)[0][VOCAB:].any()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logits_of_one_chunk_exist_at_a_time(chunk: int) -> None:
    rows = []

    def parts(x: Tensor) -> Tensor:
        rows.append(x.shape[1])
        return x.unsqueeze(0)

    hidden, weight, labels = inputs()
    columns = COLUMNS._replace(parts=parts)
    loss, _ = chunked_loss(hidden, weight, labels, SCALE, chunk=chunk, columns=columns)
    loss.backward()
    assert max(rows) == min(chunk, ROWS)
    assert sum(rows) == ROWS


def test_a_sure_token_keeps_its_small_gradient_in_bfloat16() -> None:
    """p in bfloat16 would be 1, and the gradient at the target 0."""
    logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
    logits[0, 7] = 12.0
    labels, columns = torch.tensor([7]), columns_of(LocalLinears(), VOCAB, VOCAB)
    loss, lse = cross_entropy(logits, labels, columns)
    become_gradient(logits, labels, columns, loss, lse, torch.ones(1))
    others = (VOCAB - 1) * math.exp(-12)
    expected = -others / (1 + others)
    assert abs(float(logits[0, 7]) / expected - 1) < 2**-8
    assert abs(float(logits.sum(dtype=torch.float64))) < 2**-7 * -expected


def test_a_rank_that_holds_nothing_but_padding_takes_part() -> None:
    logits, labels = torch.randn(3, 8), torch.tensor([0, 7, IGNORE])
    whole, lse = cross_entropy(logits, labels, columns_of(LocalLinears(), 8, 8))
    target = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) * (labels != IGNORE)
    other = torch.stack([lse, target, (labels != IGNORE).float()])
    columns = Columns(8, 0, lambda own: torch.stack([other, own]))
    padding = torch.randn(3, 8)
    loss, total = cross_entropy(padding, labels, columns)
    assert torch.equal(loss, whole) and torch.equal(total, lse)
    become_gradient(padding, labels, columns, loss, total, torch.ones(3))
    assert not padding.any()


def test_nothing_of_the_size_of_the_logits_is_kept_for_backward() -> None:
    loss, _ = run(*inputs(), chunk=100)
    assert loss.grad_fn is not None
    saved = [x.shape for x in loss.grad_fn.saved_tensors]  # type: ignore[attr-defined]
    assert saved == [(ROWS, WIDTH), (PADDED, WIDTH)]


def test_the_weights_gradient_of_many_bfloat16_chunks_adds_up_in_float32() -> None:
    """512 equal summands: a bfloat16 sum would stop growing at 256 of them."""
    hidden = torch.ones(512, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(PADDED, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    loss, _ = chunked_loss(hidden, weight, labels, torch.tensor(1.0), chunk=1, columns=COLUMNS)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert dweight.dtype == torch.bfloat16
    assert relative(dweight[0], torch.full((WIDTH,), -512 * (1 - 1 / VOCAB))) < 2**-7


def test_losses_of_bfloat16_are_float32() -> None:
    loss, losses = run(*inputs(torch.bfloat16))
    assert loss.dtype == losses.dtype == torch.float32


def test_without_gradients_wanted_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr("model.loss.become_gradient", never)
    with torch.no_grad():
        loss, losses = run(*inputs())
    assert not loss.requires_grad
    assert relative(losses, plain(*inputs())[1]) < 1e-14


def test_a_tied_matrix_gets_the_gradient_of_both_its_uses() -> None:
    batch = batch_of(2, 2, 4)
    model = build(config_of(NoMemory(), tie_embeddings=True))
    apart = build(config_of(NoMemory()))
    weights = model.state_dict()
    apart.load_state_dict(weights | {"head.output.weight": weights["embedding.weight"]})
    grads = []
    for each in (model, apart):
        output = each(batch.tokens, batch.starts, labels=batch.labels, scale=batch.scale)
        output.loss.backward()
        grads.append(gradients(each))
    assert "head.output.weight" not in grads[0]
    both = grads[1]["embedding.weight"] + grads[1]["head.output.weight"]
    assert relative(grads[0]["embedding.weight"], both) < 1e-13
