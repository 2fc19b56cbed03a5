"""Regularization and tied weights equal a plain formulation in float64; masks depend on seed, step and lane only."""

import copy
import hashlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import disable_kernel, not_none
from test_shared_memory import free_port
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from job.config.model import ModelConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients, LossModule, assign_lanes
from job.errors import UserError
from job.kernels.build import load_library, unavailable_reason
from job.nn.language_model import LanguageModel, build_model, build_model_with_weights
from job.nn.regularization import Regularization, mask_keys
from job.nn.state import slice_state

SEED, STEP, LANES, STEPS, TOKENS = 3, 7, 5, 6, 11
SIZES: dict[str, Any] = {"hidden_size": 8, "num_layers": 3, "embedding_size": 6}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "locked": {"dropout": 0.3, "dropout_locked": True},
    "inputs": {"input_dropout": 0.4},
    "locked inputs": {"input_dropout": 0.4, "dropout_locked": True},
    "outputs": {"dropout": 0.2, "output_dropout": 0.5, "dropout_locked": True},
    "no outputs": {"dropout": 0.2, "output_dropout": 0.0},
    "words": {"embedding_dropout": 0.3},
    "weights": {"weight_drop": 0.4},
    "activations": {"activation_regularization": 2.0, "output_dropout": 0.4},
    "differences": {"temporal_regularization": 3.0, "output_dropout": 0.4},
}
TECHNIQUES["all"] = {name: value for options in TECHNIQUES.values() for name, value in options.items()}
TECHNIQUES["all"]["output_dropout"] = 0.5
BY_LAYER: dict[str, dict[str, Any]] = {
    "sizes": {"hidden_size": (8, 33, 6)},
    "sizes, all": {**TECHNIQUES["all"], "hidden_size": (8, 33, 6)},
    "sizes, tied": {"hidden_size": (8, 33, 6), "tied": True},
}
TIED: dict[str, Any] = {"tied": True, "embedding_size": 8}
ADAPTIVE: dict[str, Any] = {"softmax": "adaptive", "adaptive_cutoffs": (4, 9)}
MODULES = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def plain_hash(x: int) -> int:
    """Lowbias32, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def plain_scales(probability: float, site: int, lane: int, steps: int, units: int) -> Tensor:
    """The factors (T, units) of a lane's elements, 0 or 1 / (1 - p), number by number."""
    if not probability:
        return torch.ones(steps, units, dtype=torch.float64)
    digest = hashlib.blake2b(f"{SEED} {STEP} {site} {lane}".encode(), digest_size=4).digest()
    key, pairs = int.from_bytes(digest, "little"), (units + 1) // 2
    draws = []
    for step in range(steps):
        hashes = [plain_hash((step * pairs + pair) * 0x9E3779B9 % 2**32 ^ key) for pair in range(pairs)]
        halves = [half for value in hashes for half in (value & 0xFFFF, value >> 16)][:units]
        draws.append([(half + 2**15) % 2**16 for half in halves])  # signed, from the lowest
    is_kept = torch.tensor(draws) >= round(probability * 65536)
    return is_kept.double() / (1 - probability)


def plain_drop(x_TBH: Tensor, probability: float, site: int, is_locked: bool) -> Tensor:
    steps = 1 if is_locked else len(x_TBH)
    scales = [plain_scales(probability, site, lane, steps, x_TBH.shape[2]) for lane in range(x_TBH.shape[1])]
    return x_TBH * torch.stack(scales, 1)


def plain_losses(model: LanguageModel, config: ModelConfig, tokens_TB: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of a window from a zero state and the penalties, by torch's modules layer by layer."""
    layers, locked = config.num_layers, config.dropout_locked
    assert model.embedding is not None
    word_scales_V = plain_scales(config.embedding_dropout, layers + 1, 0, 1, TOKENS)[0]
    x_TBE = F.embedding(tokens_TB[:-1], model.embedding.weight * word_scales_V[:, None])
    x_TBE = plain_drop(x_TBE, config.input_dropout, layers, locked)
    for layer, weights in enumerate(model.rnn.all_weights):  # type: ignore[arg-type]
        if layer:
            x_TBE = plain_drop(x_TBE, config.dropout, layer, locked)
        weight_scales = plain_scales(config.weight_drop, layers + 2 + layer, 0, 1, weights[1].numel())
        dropped = [weights[0], weights[1] * weight_scales.view_as(weights[1]), *weights[2:]]
        module = MODULES[config.cell](x_TBE.shape[2], config.layer_sizes[layer]).double()
        names = [name for name, _ in module.named_parameters()]
        x_TBE, _ = torch.func.functional_call(module, dict(zip(names, dropped, strict=True)), (x_TBE,))
    output_rate = config.dropout if config.output_dropout == "auto" else float(config.output_dropout)
    dropped_TBH = plain_drop(x_TBE, output_rate, 0, locked)
    logits_TBV = F.linear(dropped_TBH, model.linear.weight, model.linear.bias)
    penalty = config.activation_regularization * dropped_TBH.pow(2).mean()
    penalty += config.temporal_regularization * (x_TBE[1:] - x_TBE[:-1]).pow(2).mean()
    return F.cross_entropy(logits_TBV.flatten(0, 1), tokens_TB[1:].flatten()), penalty


def make_batch(config: ModelConfig, lanes: range = range(LANES)) -> Batch:
    tokens_TB = torch.randint(0, TOKENS, (STEPS + 1, LANES), generator=torch.Generator().manual_seed(0))
    own_TB = tokens_TB[:, lanes.start : lanes.stop]
    return Batch(own_TB[:-1], own_TB[1:], torch.zeros(3), mask_keys(config, SEED, STEP, lanes))


def gradients(
    config: ModelConfig, dtype: torch.dtype, lanes: range = range(LANES), num_groups: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of some lanes, and their part of the gradient of the mean loss."""
    model = build_model(config, TOKENS, seed=1).to(dtype)
    gradients_class = DeterministicGradients if num_groups else AllReduceGradients
    loss_module = LossModule(model, LANES * STEPS, config)
    stats, _ = gradients_class(loss_module, assign_lanes(len(lanes), num_groups))(make_batch(config, lanes), None)
    return stats[0], {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("options", [*TECHNIQUES.values(), *BY_LAYER.values()], ids=[*TECHNIQUES, *BY_LAYER])
def test_regularized_gradient_equals_plain_formulation(
    options: dict[str, Any], cell: str, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        disable_kernel(monkeypatch)
    elif load_library() is None:
        pytest.skip(f"no kernel: {unavailable_reason()}")
    config = ModelConfig(cell=cell, **{**SIZES, **options})
    nats, found = gradients(config, torch.float32 if has_kernel else torch.float64)
    exact = build_model(config, TOKENS, seed=1).double()
    batch = make_batch(config)
    loss, penalty = plain_losses(exact, config, torch.cat([batch.inputs_TB[:1], batch.targets_TB]))
    (loss + penalty).backward()
    tolerance = 1e-5 if has_kernel else 1e-10
    torch.testing.assert_close(nats.double(), loss.detach() * LANES * STEPS, rtol=tolerance, atol=0)
    expected = {name: weight.grad for name, weight in exact.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=0.1), name


@pytest.mark.parametrize("cell", ["lstm", "torch.nn:GRU"])
@pytest.mark.parametrize(
    "options",
    [*TECHNIQUES.values(), TIED, ADAPTIVE, *BY_LAYER.values()],
    ids=[*TECHNIQUES, "tied", "adaptive", *BY_LAYER],
)
def test_regularized_gradient_is_the_sum_over_any_workers_and_lane_groups(options: dict[str, Any], cell: str) -> None:
    if cell not in MODULES:
        options = {**options, "weight_drop": 0.0, "hidden_size": options.get("embedding_size", 6)}
    config = ModelConfig(cell=cell, **{**SIZES, **options})
    nats, expected = gradients(config, torch.float64)
    parts = [gradients(config, torch.float64, lanes) for lanes in (range(2), range(2, 5))]
    grouped_nats, grouped = gradients(config, torch.float64, num_groups=3)
    torch.testing.assert_close(torch.stack([parts[0][0] + parts[1][0], grouped_nats]), nats.expand(2))
    for name, gradient in expected.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], gradient, msg=name)
        torch.testing.assert_close(grouped[name], gradient, msg=name)


@pytest.mark.parametrize("options", TECHNIQUES.values(), ids=TECHNIQUES)
def test_regularization_changes_the_model_only_in_training(options: dict[str, Any]) -> None:
    config, plain = ModelConfig(**{**SIZES, **options}), ModelConfig(**SIZES)
    (_, trained), (_, expected) = gradients(config, torch.float64), gradients(plain, torch.float64)
    assert not torch.equal(trained["rnn.weight_hh_l1"], expected["rnn.weight_hh_l1"])
    batch = make_batch(config)
    results = [build_model(each, TOKENS, seed=1)(batch.inputs_TB, None)[0] for each in (config, plain)]
    assert torch.equal(*results)


def gradients_of_worker(rank: int, reproducible: bool, world_size: int, output: dict[str, Any]) -> list[Tensor]:
    """The statistics and gradients of two steps of a model with all techniques, one after the other."""
    config = ModelConfig(cell="lstm", **{**SIZES, **TECHNIQUES["all"], **output})
    model = build_model(config, TOKENS, seed=1).double()
    assignment = assign_lanes(LANES, 3 if reproducible else 0, rank, world_size)
    loss_module = LossModule(model, LANES * STEPS, config)
    gradients_class = DeterministicGradients if reproducible else AllReduceGradients
    compute, results = gradients_class(loss_module, assignment), []
    for _ in range(2):  # DDP rebuilds its buckets after the first
        stats, _ = compute(make_batch(config, assignment.lanes), None)
        results += [stats.clone(), *(not_none(weight.grad).clone() for weight in model.parameters())]
    return results


def compare_with_one_worker(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for reproducible, output in itertools.product((False, True), (TIED, ADAPTIVE)):
        alone = gradients_of_worker(0, reproducible, 1, output)
        together = gradients_of_worker(rank, reproducible, 2, output)
        for expected, found in zip(alone, together, strict=True):
            if reproducible:
                assert torch.equal(found, expected)
            torch.testing.assert_close(found, expected)
    dist.destroy_process_group()


@pytest.mark.slow
def test_regularized_gradient_of_two_workers_equals_that_of_one() -> None:
    spawn(compare_with_one_worker, (free_port(),), nprocs=2)


def test_tied_gradient_is_the_sum_of_those_of_embedding_and_output_layer() -> None:
    tied = ModelConfig(cell="lstm", **{**SIZES, **TECHNIQUES["all"], **TIED})
    untied = replace(tied, tied=False)
    model, plain = (build_model(config, TOKENS, seed=1).double() for config in (tied, untied))
    plain.load_state_dict(model.state_dict())
    for net, config in ((model, tied), (plain, untied)):
        AllReduceGradients(LossModule(net, LANES * STEPS, config), assign_lanes(LANES))(make_batch(config), None)
    expected = {name: not_none(weight.grad) for name, weight in plain.named_parameters()}
    expected["embedding.weight"] = expected["embedding.weight"] + expected.pop("linear.weight")
    found = {name: not_none(weight.grad) for name, weight in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", MODULES)
def test_layers_of_different_sizes_have_torch_names_and_carry_the_state_of_lanes(cell: str) -> None:
    config = ModelConfig(cell=cell, **{**SIZES, **BY_LAYER["sizes"]})
    model = build_model(config, TOKENS, seed=1)
    for layer, (inputs, units) in enumerate([(6, 8), (8, 33), (33, 6)]):
        for name, weight in MODULES[cell](inputs, units).named_parameters():
            own = model.state_dict()[f"rnn.{name.removesuffix('0')}{layer}"]
            assert own.shape == weight.shape
            assert abs(own.std() * (3 * units) ** 0.5 - 1) < 0.3  # uniform between plus and minus 1 / sqrt(units)
    tokens_TB = make_batch(config).inputs_TB
    whole, last = model(tokens_TB, None)
    first, state = model(tokens_TB[:2], None)
    assert isinstance(state, tuple)
    assert [tuple(tensor.shape) for tensor in state] == [(1, LANES, size) for size in (8, 33, 6)] * (len(state) // 3)
    second, state = model(tokens_TB[2:, 1:4], slice_state(state, 1, 3))
    torch.testing.assert_close(torch.cat([first[:, 1:4], second]), whole[:, 1:4])
    torch.testing.assert_close(state, slice_state(last, 1, 3))
    with pytest.raises(UserError, match="does not have the sizes of the model"):
        model(tokens_TB, state)


def is_tied(model: LanguageModel) -> bool:
    return model.embedding is not None and model.embedding.weight is model.linear.weight


@pytest.mark.parametrize("cell", ["gru", "torch.nn:GRU"])
def test_tied_model_shares_storage_also_after_conversion_copy_and_loading(cell: str) -> None:
    config = ModelConfig(cell=cell, **{**SIZES, **TIED})
    model = build_model(config, TOKENS, seed=1)
    weights = model.state_dict()
    assert torch.equal(weights["embedding.weight"], weights["linear.weight"])
    loaded = build_model_with_weights(config, TOKENS, 2, weights, torch.float64, "checkpoint")
    assert all(is_tied(each) for each in (model, loaded, copy.deepcopy(model), model.to(torch.float64)))
    torch.testing.assert_close(loaded.state_dict(), {name: weight.double() for name, weight in weights.items()})


def test_tied_model_with_different_weights_raises() -> None:
    config = ModelConfig(**{**SIZES, **TIED})
    weights = build_model(replace(config, tied=False), TOKENS, seed=1).state_dict()
    for embedding in (weights["embedding.weight"], weights["linear.weight"].double()):
        changed = {**weights, "embedding.weight": embedding}
        with pytest.raises(
            UserError, match=r"init: .* embedding.weight and linear.weight differ; set model.tied = false"
        ):
            build_model_with_weights(config, TOKENS, 1, changed, torch.float32, "init")


def test_activation_regularization_of_windows_of_one_step_has_no_differences() -> None:
    config = ModelConfig(**SIZES, temporal_regularization=2.0)
    nats = torch.ones((), requires_grad=True)
    hidden_TBH = torch.ones(1, LANES, 8, requires_grad=True)
    total = Regularization(config, mask_keys(config, 0, 0, range(LANES))).add_penalty(nats, hidden_TBH, hidden_TBH)
    assert torch.equal(total, nats)


def test_temporal_regularization_has_no_differences_across_a_reset() -> None:
    config = ModelConfig(**SIZES, temporal_regularization=2.0)
    model = build_model(config, TOKENS, 1).double()
    model.reset_token = 3
    inputs, targets, _, keys_SB = make_batch(config)
    model.cross_entropy_sum(inputs, targets, None, Regularization(config, keys_SB))[0].backward()
    hidden_TBH, _ = model._hidden_states(inputs, None, None)
    squares_TBH = (hidden_TBH[1:] - hidden_TBH[:-1]).pow(2)
    inside = (inputs[1:] != 3).nonzero()
    assert 0 < len(inside) < inputs[1:].numel()
    penalty = 2.0 * torch.stack([squares_TBH[step, lane].sum() for step, lane in inside]).sum() / squares_TBH.numel()
    nats, _ = model.cross_entropy_sum(inputs, targets, None)
    weights = list(model.parameters())
    expected = torch.autograd.grad(nats + inputs.numel() * penalty, weights)
    torch.testing.assert_close([weight.grad for weight in weights], list(expected), rtol=1e-9, atol=1e-12)


def test_masks_of_another_step_and_seed_differ() -> None:
    config = ModelConfig(**SIZES, **TECHNIQUES["all"])
    keys_SB = mask_keys(config, SEED, STEP, range(LANES))
    assert len(set(keys_SB[: config.num_layers + 1].flatten().tolist())) == (config.num_layers + 1) * LANES
    for other in (mask_keys(config, SEED + 1, STEP, range(LANES)), mask_keys(config, SEED, STEP + 1, range(LANES))):
        assert not (other == keys_SB).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dropout": 0.5}, "model.input_dropout = 0.5: one-hot inputs; set model.embedding_size"),
        ({"embedding_dropout": 0.5}, "model.embedding_dropout = 0.5: one-hot inputs; set model.embedding_size"),
        ({"weight_drop": 0.5, "cell": "minlstm"}, "model.cell = minlstm has no hidden weights; leave it out"),
        ({"weight_drop": 0.5, "cell": "a:B"}, "the hidden weights of model.cell = a:B are unknown; leave it out"),
        ({"hidden_size": (4, 5)}, "model.hidden_size has 2 entries for model.num_layers = 1; give one for each layer"),
        (
            {"hidden_size": (4, 5), "num_layers": 2, "cell": "a:B"},
            r"model.hidden_size = \[4, 5\]: model.cell = a:B takes an integer; give one",
        ),
        ({"tied": True}, "model.embedding_size = 0 and model.hidden_size = 256 differ; make them equal"),
        ({"output_dropout": "none"}, 'model.output_dropout = "none": must be "auto" .*, or a number'),
    ],
)
def test_regularization_that_does_not_fit_the_model_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)
