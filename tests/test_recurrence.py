"""Fast = plain: every way to run a layer gives torch's own outputs, states and gradients."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, disable_kernel
from torch import nn
from torch.nn import functional as F

from job.config.schema import GenerateConfig, ModelConfig
from job.inference.generate import generate_batch, generate_tokens
from job.kernels import ops
from job.kernels.build import load_library, unavailable_reason
from job.nn.dropout import Dropout, dropout_keys
from job.nn.language_model import build_model
from job.nn.loss import linear_cross_entropy
from job.nn.rnn import _flatten_weights, rnn_layer
from job.nn.rnn_fallback import gru_layer, tanh_layer

KINDS = {"RNN_TANH": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
SIZES = [(1, 1, 1, 3), (5, 3, 7, 4), (17, 1, 6, 9), (33, 3, 1, 28), (257, 9, 3, 10), (64, 35, 5, 70)]  # H, B, T, V
# Of each tensor's norm (of 0.1 where that is less, for sums of a few numbers that cancel). bf16 itself has 2^-9.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}

needs_kernel = pytest.mark.skipif(load_library() is None, reason=f"no kernel: {unavailable_reason()}")


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch):
    """The kernel, or what there is without it."""
    if request.param == "torch":
        disable_kernel(monkeypatch)
    elif load_library() is None:
        pytest.skip(f"no kernel: {unavailable_reason()}")
    return request.param


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def assert_near(found, expected, bound):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp(min=0.1)
        assert error <= bound, (number, error.item())


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("given", ["one-hot", "embedding", "features"])
@pytest.mark.parametrize("cell", KINDS)
def test_a_layer_is_torchs(way, cell, given, dtype):
    torch.manual_seed(0)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    for units, lanes, steps, tokens in SIZES:
        features = tokens if given == "one-hot" else 6
        torchs = KINDS[cell](features, units)
        ours = [weight.detach().to(own).requires_grad_() for weight in torchs.parameters()]
        torchs = torchs.double()
        inputs = torch.randint(0, tokens, (steps, lanes))
        vectors = torch.randn(tokens, features, requires_grad=True, dtype=own)
        state = [torch.rand(lanes, units, dtype=own).requires_grad_() for _ in range(2 if cell == "LSTM" else 1)]
        leaves = [*ours, *state, *([] if given == "one-hot" else [vectors])]

        exact_vectors = (torch.eye(tokens) if given == "one-hot" else vectors.detach()).double().requires_grad_()
        exact_state = [part.detach().double().requires_grad_() for part in state]
        firsts = tuple(part[None] for part in exact_state)
        hidden, last = torchs(F.embedding(inputs, exact_vectors), firsts if cell == "LSTM" else firsts[0])
        expected = [hidden, *(part[0] for part in parts(last))]
        exact_leaves = [*torchs.parameters(), *exact_state, *([] if given == "one-hot" else [exact_vectors])]
        slopes = [torch.randn_like(part) for part in expected]

        with autocast(dtype):
            if given == "features":
                found, after = rnn_layer(cell, F.embedding(inputs, vectors), None, tuple(state), ours)
            else:
                table = vectors if given == "embedding" else None
                found, after = rnn_layer(cell, inputs, table, tuple(state), ours)
        outputs = [found, *after]
        assert found.dtype == dtype
        assert_near(outputs, expected, BOUNDS[dtype])
        objective = sum((part.double() * slope).sum() for part, slope in zip(outputs, slopes, strict=True))
        exact = sum((part * slope).sum() for part, slope in zip(expected, slopes, strict=True))
        assert_near(torch.autograd.grad(objective, leaves), torch.autograd.grad(exact, exact_leaves), BOUNDS[dtype])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_layers_with_dropout_are_the_exact_models(way, cell, low):
    options = ModelConfig(cell=cell, hidden_size=40, num_layers=3, embedding_size=7, dropout=0.3)
    ours, exact = (build_model(options, 11, seed=1) for _ in range(2))
    exact = exact.double()
    inputs, targets = torch.randint(0, 11, (2, 6, 4))
    dropout = Dropout(0.3, dropout_keys(0, 5, 3, range(4)))
    with autocast(torch.bfloat16 if low else None):
        nats, state = ours.cross_entropy_sum(inputs, targets, None, dropout)
    expected, exact_state = exact.cross_entropy_sum(inputs, targets, None, dropout)
    nats.backward()
    expected.backward()
    bound = BOUNDS[torch.bfloat16 if low else torch.float32]
    assert_near([nats, *parts(state)], [expected, *parts(exact_state)], bound)
    gradients = ([weight.grad for weight in net.parameters()] for net in (ours, exact))
    assert_near(*gradients, bound)


def test_the_stepwise_backwards_are_their_gradients():
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(tanh_layer, [random(4, 2, 3), random(2, 3), random(3, 3)])
    assert torch.autograd.gradcheck(gru_layer, [random(4, 2, 9), random(2, 3), random(9, 3), random(3)])


@pytest.mark.parametrize(("rows", "units", "tokens"), [(1, 32, 2), (37, 64, 5), (130, 256, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_loss_is_torchs(way, dtype, rows, units, tokens):
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, units, requires_grad=True)
    weight, bias = torch.randn(tokens, units, requires_grad=True), torch.randn(tokens, requires_grad=True)
    targets = torch.randint(0, tokens, (1, rows))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = F.cross_entropy(F.linear(*exact)[0], targets[0], reduction="sum")
    with autocast(dtype):
        found = linear_cross_entropy(hidden.to(dtype), weight, bias, targets)
    assert found.dtype == torch.float32
    assert_near([found], [expected], BOUNDS[dtype])
    gradients = torch.autograd.grad(found / 7, [hidden, weight, bias])
    assert_near(gradients, torch.autograd.grad(expected / 7, exact), BOUNDS[dtype])


@needs_kernel
@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_lanes_bits_do_not_depend_on_its_company(cell, dtype):
    torch.manual_seed(0)
    weights = list(KINDS[cell](7, 40).parameters())
    tokens = torch.randint(0, 7, (6, 77))
    state = tuple(torch.randn(77, 40) for _ in range(2 if cell == "LSTM" else 1))

    def run(first, last, threads):
        torch.set_num_threads(threads)
        some = tokens[:, first:last].clone()
        begin = tuple(part[first:last].clone().requires_grad_() for part in state)
        with autocast(dtype):
            hidden, after = rnn_layer(cell, some, None, begin, weights)
        return hidden, *after, *torch.autograd.grad(hidden.float().square().sum(), begin)

    whole = run(0, 77, 1)
    for first, last, threads in [(0, 77, 2), (0, 1, 1), (0, 5, 1), (5, 77, 3), (76, 77, 1), (13, 30, 2)]:
        for part, (alone, company) in enumerate(zip(run(first, last, threads), whole, strict=True)):
            lanes = company[:, first:last] if part == 0 else company[first:last]
            assert torch.equal(alone, lanes), (first, last, threads, part)


@needs_kernel
def test_weight_gradients_are_the_same_bits_on_any_number_of_threads():
    net = build_model(ModelConfig(cell="gru", hidden_size=96, embedding_size=5), 70, 0)
    inputs, targets = torch.randint(0, 70, (2, 9, 50))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        nats, _ = net.cross_entropy_sum(inputs, targets, None)
        found.append(torch.autograd.grad(nats, list(net.parameters())))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_of_what_is_no_number_is_none(way, value):
    hidden = torch.ones(3, 2, 32)
    hidden[1, 1, 7] = value
    nats = linear_cross_entropy(hidden, torch.randn(5, 32), torch.zeros(5), torch.zeros(3, 2, dtype=torch.int64))
    assert nats.isnan()


def test_hidden_states_that_do_not_fit_the_targets_are_an_error(way):
    with pytest.raises((ValueError, RuntimeError)):
        linear_cross_entropy(
            torch.ones(1, 4, 32), torch.ones(5, 32), torch.zeros(5), torch.zeros(5, 4, dtype=torch.int64)
        )


@needs_kernel
def test_what_is_no_number_stays_none_and_what_is_large_is_held():
    weights = list(nn.LSTM(3, 32).parameters())
    tokens = torch.tensor([[0, 1, 2]])
    huge = weights[0].detach().clone()
    huge[:, 0], huge[:, 1], huge[:, 2] = 1e30, -1e30, float("nan")
    zeros = torch.zeros(3, 32)
    hidden, (_, cell) = rnn_layer("LSTM", tokens, None, (zeros, zeros), [huge, *weights[1:]])
    assert hidden[0, :2].isfinite().all()
    assert hidden[0, 2].isnan().all()
    assert cell[2].isnan().all()


@needs_kernel
def test_a_token_outside_the_vocabulary_is_an_error():
    weights = list(nn.RNN(3, 32).parameters())
    for token in (-1, 3):
        with pytest.raises(IndexError, match="vocabulary"):
            rnn_layer("RNN_TANH", torch.tensor([[token]]), None, (torch.zeros(1, 32),), weights)
        with pytest.raises(IndexError, match="vocabulary"):
            linear_cross_entropy(torch.zeros(1, 1, 32), torch.zeros(3, 32), torch.zeros(3), torch.tensor([[token]]))


def why_not(cache, **environment):
    """What another process says of the kernel, with that folder as the user's cache."""
    code = "from job.kernels.build import unavailable_reason; print(unavailable_reason())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "LANES_KERNEL": "", "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_without_a_compiler_there_is_no_kernel(tmp_path):
    assert "no C compiler" in why_not(tmp_path, PATH="")
    assert "off" in why_not(tmp_path, LANES_KERNEL="off")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "no such flag" in why_not(tmp_path, PATH=str(tmp_path))


@needs_kernel
def test_the_cache_is_ours_alone(tmp_path):
    (tmp_path / "lanes").mkdir(0o775)  # as where texts were cached, and new files are the group's too
    assert why_not(tmp_path) == "None"
    folder = tmp_path / "lanes" / "kernels"
    (built,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    made = built.stat().st_mtime_ns
    assert why_not(tmp_path) == "None"
    assert built.stat().st_mtime_ns == made
    built.chmod(0o777)
    assert "others may write it" in why_not(tmp_path)
    built.unlink()
    built.symlink_to(ROOT / "README.md")
    assert "belongs to another user" in why_not(tmp_path)
    built.unlink()
    built.write_bytes(b"no library")
    assert why_not(tmp_path) != "None"
    folder.chmod(0o777)
    assert "others may write it" in why_not(tmp_path)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(("layers", "embedding"), [(1, 0), (2, 7)])
def test_speech_is_one_step_after_the_other(way, cell, layers, embedding, monkeypatch):
    net = build_model(ModelConfig(cell=cell, num_layers=layers, embedding_size=embedding, hidden_size=64), 28, 3)
    prefixes = torch.randint(0, 28, (5, 7))
    monkeypatch.setattr(ops, "GREEDY_CHUNK", 7)
    spoken = generate_batch(net, prefixes, GenerateConfig(length=40), 0)
    inputs, state, expected = prefixes, None, []
    with torch.no_grad():
        for _ in range(40):
            logits, state = net(inputs, state)
            inputs = logits[-1:].argmax(2)
            expected.append(inputs[0])
    assert torch.equal(spoken, torch.stack(expected))
    alone = generate_tokens(net, prefixes[:, 3].numpy(), GenerateConfig(length=40), 0)
    assert alone == spoken[:, 3].tolist()


def test_weights_in_one_piece_are_the_same_weights():
    """As cuDNN wants them; no GPU is needed to see that nothing is lost or moved."""
    weights = list(torch.nn.GRU(5, 8).parameters())
    pieces = _flatten_weights(weights, torch.float64)
    assert all(torch.equal(piece, weight.double()) for piece, weight in zip(pieces, weights, strict=True))
    ends = [piece.data_ptr() + piece.numel() * 8 for piece in pieces]
    assert [piece.data_ptr() for piece in pieces[1:]] == ends[:-1]
    sum(piece.square().sum() for piece in pieces).backward()
    assert all(torch.allclose(weight.grad, 2 * weight) for weight in weights)
