"""Steps of a decoder: equal to the model's, and with the same bits for any lanes that are advanced together."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from job.config.model import ModelConfig
from job.errors import NonFiniteLogits
from job.inference.decoder import Decoder
from job.inference.ensemble import Ensemble
from job.inference.generate import continue_greedily
from job.nn.language_model import LanguageModel, build_model
from job.nn.state import State, cat_states, slice_state

SIZES: list[dict[str, object]] = [
    {"hidden_size": 37},
    {"hidden_size": 64, "num_layers": 2, "embedding_size": 7},
    {"hidden_size": 64, "softmax": "adaptive", "adaptive_cutoffs": [5, 12]},
    {"hidden_size": [20, 33, 15], "num_layers": 3, "embedding_size": 15, "tied": True},
    {"hidden_size": 33, "softmax": "adaptive", "adaptive_cutoffs": [4, 9]},
]
KERNEL_CELLS = ["rnn", "gru", "lstm"]
CELLS = [*KERNEL_CELLS, "mlstm", "mogrifier", "mingru", "minlstm"]
V = 29


def random_model(cell: str, sizes: dict[str, object], seed: int = 0) -> LanguageModel:
    """A model whose weights are large enough that lanes differ."""
    model = build_model(ModelConfig(cell=cell, **sizes), V, seed)  # type: ignore[arg-type]
    for weight in model.parameters():
        weight.data *= 2
    return model


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(0))


def lanes_of(implementation: str, cell: str, dtype: torch.dtype = torch.float32) -> int:
    """A number of lanes: of more than one block of the kernel; without it each lane takes its own step."""
    return 67 if implementation == "kernel" and cell in KERNEL_CELLS and dtype == torch.float32 else 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_decoder_step_equals_the_model(
    implementation: str, cell: str, sizes: dict[str, object], dtype: torch.dtype
) -> None:
    model = random_model(cell, sizes).to(dtype)
    model.reset_token = 3
    decoder, tokens_TB = Decoder(model), random_tokens(5, lanes_of(implementation, cell, dtype))
    assert (tokens_TB[1:] == model.reset_token).any()
    with torch.no_grad():
        expected = model(tokens_TB, None)
    state: State = None
    logits = []
    for tokens_B in tokens_TB:
        logits_BV, state = decoder.step(tokens_B, state)
        logits.append(logits_BV)
    found = torch.cat(logits).view_as(expected[0]), state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cell", "sizes", "models"),
    [
        *itertools.product(CELLS, SIZES, [1]),
        *itertools.product(CELLS, SIZES[1:3], [2]),
        *itertools.product(["cells:DecayCell"], [{"hidden_size": 37}], [1, 2]),
    ],
)
def test_ensemble_step_of_lanes_has_the_bits_of_each_lane_alone(
    implementation: str, cell: str, sizes: dict[str, object], models: int
) -> None:
    ensemble = Ensemble([random_model(cell, sizes, seed) for seed in range(models)], 0)
    lanes = lanes_of(implementation, cell)
    tokens_TB = random_tokens(5, lanes)
    states = ensemble.advance(tokens_TB[:2], [None] * models)
    alone = [[slice_state(state, lane, 1) for state in states] for lane in range(lanes)]
    for tokens_B, count in zip(tokens_TB[2:], (lanes, lanes // 5, 1), strict=True):
        order = torch.randperm(lanes, generator=torch.Generator().manual_seed(count))[:count].tolist()
        together = [cat_states([alone[lane][number] for lane in order]) for number in range(models)]
        logits_BV, _ = ensemble.step(tokens_B[order], together)
        for row, lane in enumerate(order):
            logits_1V, after = ensemble.step(tokens_B[lane : lane + 1], alone[lane])
            assert torch.equal(logits_1V[0], logits_BV[row])
            alone[lane] = after


def test_decoder_step_leaves_the_state_before_it_as_it_was(implementation: str) -> None:
    model = random_model("lstm", {"hidden_size": 32})
    state = model.advance(random_tokens(3, 4), None)
    copies = [tensor.clone() for tensor in state or ()]
    Decoder(model).step(random_tokens(4), state)
    assert all(map(torch.equal, state or (), copies))


@pytest.mark.parametrize("token", [-1, V])
def test_decoder_step_with_a_token_outside_the_vocabulary_raises(implementation: str, token: int) -> None:
    decoder = Decoder(random_model("gru", {"hidden_size": 32, "embedding_size": 5}))
    with pytest.raises(IndexError):
        decoder.step(torch.tensor([0, token]), None)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_decoder_step_on_threads_has_the_bits_of_one(cell: str) -> None:
    decoder, tokens_B = Decoder(random_model(cell, {"hidden_size": 70, "num_layers": 2})), random_tokens(67)
    results = []
    for threads in (1, 3):
        with torch_threads(threads):
            results.append(decoder.step(tokens_B, None))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", SIZES[1:3])
@pytest.mark.parametrize("cell", ["gru", "mingru"])
def test_ensemble_of_a_model_whose_logits_are_not_finite_raises(
    implementation: str, cell: str, sizes: dict[str, object], value: float
) -> None:
    model = random_model(cell, sizes)
    model.linear.bias.data[2] = value
    for ensemble in (Ensemble([model]), Ensemble([random_model(cell, sizes), model])):
        states: list[State] = [None] * len(ensemble.models)
        with pytest.raises(NonFiniteLogits, match=r"largest logit is (nan|inf)"):
            ensemble.step(random_tokens(2), states)
        with pytest.raises(NonFiniteLogits):
            continue_greedily(ensemble, random_tokens(2), states, 3)
