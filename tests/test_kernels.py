"""The compiled kernels: determinism, invalid input, and how they are built, cached and loaded."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, not_none
from torch import nn
from torch.nn import functional as F

from job.config.model import ModelConfig
from job.kernels import abi, build
from job.kernels.build import load_library, unavailable_reason
from job.kernels.memory import MIN_NUMBERS, empty_weight, release_memory
from job.kernels.ops import embedding, scale_gradients
from job.nn.cross_entropy import linear_cross_entropy
from job.nn.language_model import build_model
from job.nn.rnn import rnn_layer

CELLS = {"RNN_TANH": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}

needs_kernel = pytest.mark.skipif(load_library() is None, reason=f"no kernel: {unavailable_reason()}")


@needs_kernel
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_lane_bits_do_not_depend_on_other_lanes_or_threads(cell: str, dtype: torch.dtype, share: float) -> None:
    torch.manual_seed(0)
    starts = torch.rand(6, 77) < share
    weights = list(CELLS[cell](7, 40).parameters())
    tokens = torch.randint(0, 7, (6, 77))
    state = tuple(torch.randn(77, 40) for _ in range(2 if cell == "LSTM" else 1))

    def run(first: int, last: int, threads: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(threads)
        initial = tuple(part[first:last].clone().requires_grad_() for part in state)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            lanes = tokens[:, first:last].clone(), None, initial, weights, starts[:, first:last]
            hidden, last_state = rnn_layer(cell, *lanes)
        return hidden, *last_state, *torch.autograd.grad(hidden.float().square().sum(), initial)

    all_lanes = run(0, 77, 1)
    for first, last, threads in [(0, 77, 2), (0, 1, 1), (0, 5, 1), (5, 77, 3), (76, 77, 1), (13, 30, 2)]:
        for number, (some, every) in enumerate(zip(run(first, last, threads), all_lanes, strict=True)):
            expected = every[:, first:last] if number == 0 else every[first:last]
            assert torch.equal(some, expected), (first, last, threads, number)


@needs_kernel
def test_weight_gradients_are_bitwise_equal_on_any_number_of_threads() -> None:
    model = build_model(ModelConfig(cell="gru", hidden_size=96, embedding_size=5), 70, 0)
    inputs, targets = torch.randint(0, 70, (2, 9, 50))
    gradients = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        nats, _ = model.cross_entropy_sum(inputs, targets, None)
        gradients.append(torch.autograd.grad(nats, list(model.parameters())))
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_output_layer_in_blocks_of_rows_agrees_with_float64_on_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, units, tokens = 261, 45, 33_001  # three blocks
    hidden, weight, bias = (torch.randn(*shape) for shape in ((1, rows, units), (tokens, units), (tokens,)))
    targets = torch.randint(0, tokens, (1, rows))
    rounded = [x.to(dtype).float().requires_grad_() for x in (hidden, weight, bias)]  # so that little else is rounded
    exact = [x.detach().double().requires_grad_() for x in rounded]
    expected = F.cross_entropy(F.linear(*exact)[0], targets[0], reduction="sum")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            nats = linear_cross_entropy(rounded[0], rounded[1], rounded[2], targets)
        results.append([nats, *torch.autograd.grad(nats / 7, rounded)])
        assert all(map(torch.equal, results[0], results[-1])), threads
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for result, value in zip(results[0], [expected, *torch.autograd.grad(expected / 7, exact)], strict=True):
        assert (result - value).abs().max() <= tolerance * value.abs().max()


@needs_kernel
@pytest.mark.parametrize("upstream", [1.0, 0.25, 1e-3])
def test_output_layer_has_the_gradients_of_the_loss_whatever_gradient_was_expected(upstream: float) -> None:
    torch.manual_seed(0)
    shapes = (3, 5, 24), (70, 24), (70,)
    tensors = [torch.randn(*shape).requires_grad_() for shape in shapes]
    targets = torch.randint(0, 70, (3, 5))
    loss = F.cross_entropy(F.linear(*tensors).flatten(0, 1), targets.flatten(), reduction="sum") / 4
    found = linear_cross_entropy(tensors[0], tensors[1], tensors[2], targets, upstream) / 4
    for gradient, expected in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(loss, tensors), strict=True):
        torch.testing.assert_close(gradient, expected)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_output_layer_with_large_logits_agrees_with_float64_and_each_row_has_the_bits_of_the_row_alone(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    rows, units, tokens = 20, 32, 200
    hidden, weight = torch.randn(1, rows, units), torch.randn(tokens, units)
    bias, targets = torch.zeros(tokens), torch.arange(rows)[None] * 10
    weight[:, 0], weight[40, 0] = 0, 1
    hidden[..., 0] = torch.tensor([-1e4, -100, 0, 55, 65, 100, 300, 1e4, 1e6, 0.0] * 2)  # of the logit of token 40
    bias[:32], bias[150] = -10, 20
    rounded = [x.to(dtype).float().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    expected_R = F.cross_entropy(F.linear(*exact)[0], targets[0], reduction="none")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        nats = linear_cross_entropy(rounded[0], rounded[1], rounded[2], targets)
        found = [nats, *torch.autograd.grad(nats, rounded)]
        for row in range(rows):
            one = slice(row, row + 1)
            alone = linear_cross_entropy(rounded[0][:, one], rounded[1], rounded[2], targets[:, one])
            torch.testing.assert_close(alone.double(), expected_R[row], rtol=1e-5, atol=1e-4)
            (dhidden,) = torch.autograd.grad(alone, rounded[0])
            assert torch.equal(dhidden[:, one], found[1][:, one]), row
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    expected = [expected_R.sum(), *torch.autograd.grad(expected_R.sum(), exact)]
    for result, value in zip(found, expected, strict=True):
        assert (result - value).abs().max() <= tolerance * value.abs().max()


@needs_kernel
def test_embedding_gradient_has_the_bits_of_torch_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (35, 20)) * 60
    for units in (200, 7):
        weight = torch.randn(2400, units, requires_grad=True)
        gradient = torch.randn(35, 20, units)
        (expected,) = torch.autograd.grad(F.embedding(tokens, weight), weight, gradient)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.autograd.grad(embedding(tokens, weight), weight, gradient)[0], expected)


@needs_kernel
def test_kernel_called_by_several_threads_at_once_has_the_same_bits() -> None:
    torch.set_num_threads(3)
    gradients = [torch.randn(300_000) for _ in range(40)]
    expected = [gradient * 3 for gradient in gradients]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda gradient: scale_gradients([gradient], 3.0), gradients))
    assert all(map(torch.equal, gradients, expected))


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_starts_threads_of_its_own() -> None:
    torch.set_num_threads(3)
    gradient = torch.ones(300_000)
    scale_gradients([gradient], 2.0)
    child = os.fork()
    if not child:
        signal.alarm(60)
        scale_gradients([gradient], 2.0)
        os._exit(bool((gradient.numpy() != 4).any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_of_a_weight_is_used_again_after_its_last_view_is_freed() -> None:
    release_memory()
    weight = empty_weight(2, MIN_NUMBERS // 2)
    address, last_row = weight.data_ptr(), nn.Parameter(weight[1])
    del weight
    last_row.grad, other = torch.zeros_like(last_row), empty_weight(MIN_NUMBERS)
    assert other.data_ptr() != address
    del last_row
    assert empty_weight(MIN_NUMBERS).data_ptr() == address


@needs_kernel
def test_gradient_that_is_kept_is_unchanged_by_later_steps() -> None:
    model = build_model(ModelConfig(cell="lstm", hidden_size=40, embedding_size=40), MIN_NUMBERS // 40 + 1, 0)
    inputs, targets = torch.randint(0, 100, (2, 3, 4))
    gradients: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for count in (2, 3, 4):
        nats, _ = model.cross_entropy_sum(inputs[:, :count], targets[:, :count], None)
        gradients += torch.autograd.grad(nats, model.linear.weight)
        copies.append(gradients[-1].clone())
    assert all(map(torch.equal, gradients, copies))


@needs_kernel
def test_lstm_saturates_large_inputs_and_propagates_nan() -> None:
    weights = list(nn.LSTM(3, 32).parameters())
    tokens = torch.tensor([[0, 1, 2]])
    weight_ih = weights[0].detach().clone()
    weight_ih[:, 0], weight_ih[:, 1], weight_ih[:, 2] = 1e30, -1e30, float("nan")
    zeros = torch.zeros(3, 32)
    hidden, (_, cell) = rnn_layer("LSTM", tokens, None, (zeros, zeros), [weight_ih, *weights[1:]])
    assert hidden[0, :2].isfinite().all()
    assert hidden[0, 2].isnan().all()
    assert cell[2].isnan().all()


@needs_kernel
def test_token_outside_vocabulary_raises_index_error() -> None:
    weights: list[torch.Tensor] = list(nn.RNN(3, 32).parameters())
    for token in (-1, 3):
        with pytest.raises(IndexError, match="vocabulary"):
            rnn_layer("RNN_TANH", torch.tensor([[token]]), None, (torch.zeros(1, 32),), weights)
        with pytest.raises(IndexError, match="vocabulary"):
            linear_cross_entropy(torch.zeros(1, 1, 32), torch.zeros(3, 32), torch.zeros(3), torch.tensor([[token]]))


@pytest.fixture
def load_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Loads the kernels with the test's folder as the user's cache; returns why that is impossible, or None."""

    def load(**environment: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in {"LANES_KERNEL": "", "XDG_CACHE_HOME": str(tmp_path), **environment}.items():
                patch.setenv(name, value)
            return str(build._load_or_explain.__wrapped__()[1])

    return load


def test_load_without_working_compiler_explains_why(tmp_path: Path, load_with: Callable[..., str]) -> None:
    assert "no C compiler" in load_with(PATH="")
    assert "off" in load_with(LANES_KERNEL="off")
    assert "'amx', which is neither off nor no-amx" in load_with(LANES_KERNEL="amx")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "no such flag" in load_with(PATH=str(tmp_path))


@pytest.mark.slow
@needs_kernel
def test_kernels_without_amx_pass_the_tests_of_bf16() -> None:
    code = "import sys, pytest; from job.kernels.ops import uses_amx; sys.exit(uses_amx() or pytest.main(sys.argv[1:]))"
    tests = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "bfloat16", "tests/test_kernels.py", "tests/test_rnn.py"]
    environment = {**os.environ, "LANES_KERNEL": "no-amx"}
    ended = subprocess.run(
        [sys.executable, "-c", code, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
@needs_kernel
def test_load_rejects_cache_that_others_can_write(tmp_path: Path, load_with: Callable[..., str]) -> None:
    (tmp_path / "lanes").mkdir(0o775)  # as if texts had been cached with a umask of 002
    assert load_with() == "None"
    folder = tmp_path / "lanes" / "kernels"
    (built,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    modified = built.stat().st_mtime_ns
    assert load_with() == "None"
    assert built.stat().st_mtime_ns == modified
    built.chmod(0o777)
    assert "others may write it" in load_with()
    built.unlink()
    built.symlink_to(ROOT / "README.md")
    assert "belongs to another user" in load_with()
    built.unlink()
    built.write_bytes(b"no library")
    code = "from job.kernels.build import load_library; assert load_library() is None"  # not loaded in this process yet
    environment = {**os.environ, "LANES_KERNEL": "", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    folder.chmod(0o777)
    assert "others may write it" in load_with()


@needs_kernel
@pytest.mark.parametrize("struct", abi.STRUCTS)
def test_load_rejects_struct_of_another_size(struct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = Path(abi.__file__).with_name("api.h").read_text()
    structs, _ = abi.parse_header(header.replace(f"}} {struct};", f"index_t extra; }} {struct};"))
    monkeypatch.setitem(abi.STRUCTS, struct, structs[struct])
    library, reason = build._load_or_explain.__wrapped__()
    assert library is None
    assert f"{struct} has another size" in not_none(reason)


def test_parse_header_understands_numbers_structs_and_pointers() -> None:
    text = """
    typedef struct { index_t rows, columns; /* a comment; */ const float *weight, *bias; float scale; } Inner;
    typedef struct { Inner inner; const Inner *many; } Outer;
int compute(const Outer *args, void *const *outputs, double seconds);
int version(void);
    """
    structs, functions = abi.parse_header(text)
    inner, outer = structs["Inner"], structs["Outer"]
    fields: Any = inner._fields_
    long, pointer = ctypes.c_long, ctypes.c_void_p
    assert [ctype for _, ctype in fields] == [long, long, pointer, pointer, ctypes.c_float]
    assert [name for name, _ in fields] == ["rows", "columns", "weight", "bias", "scale"]
    assert outer._fields_ == [("inner", inner), ("many", ctypes.POINTER(inner))]
    assert functions == {"compute": [ctypes.POINTER(outer), pointer, ctypes.c_double], "version": []}
    with pytest.raises(KeyError, match="short"):
        abi.parse_header("typedef struct { short rows; } Args;")


def test_kernel_args_reject_invalid_fields() -> None:
    args = abi.STRUCTS["LinearArgs"]
    assert args(rows=3, left=(left := torch.ones(2))).left == left.data_ptr()
    with pytest.raises(AssertionError, match="no field row"):
        args(row=3)
    with pytest.raises(AssertionError, match="not contiguous"):
        args(left=torch.ones(2, 2).t())
    with pytest.raises(TypeError):
        args(rows=1.5)
