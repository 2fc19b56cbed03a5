"""Memory of saving and loading in units of W, the size of the weights; AdamW keeps two moments of that size."""

import gc
from collections.abc import Callable
from ctypes import CDLL, Structure, c_size_t
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import not_none

from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.text import StreamConfig
from job.config.training import OptimizerConfig
from job.data.dataset import Dataset
from job.data.vocabulary import Vocabulary
from job.distributed.context import World
from job.inference.ensemble import Ensemble
from job.inference.generate import continue_greedily, load_model, read_tokens
from job.kernels.build import load_library, unavailable_reason
from job.nn.cross_entropy import linear_cross_entropy
from job.nn.language_model import LanguageModel, build_model
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.checkpoint import commit_checkpoint, find_latest_valid, weights_sha256
from job.training.checkpoint_writer import CheckpointWriter
from job.training.events import Event
from job.training.resume import agree_on_resume_point
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState, build_train_state

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
WORLD = World(0, 1, torch.device("cpu"), 1, "abcdef")
VOCABULARY = Vocabulary("char", ("<unk>", *"abcdefgh"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not RESET.exists(), reason="reads /proc")]


def peak_growth(action: Callable[..., Any]) -> int:
    """The peak of the resident size during the action, over that before it, in bytes, without pages of files.

    The kernel reclaims pages of libraries that were idle, and any action may read them again. The heap may also grow by
    some MB of pages that glibc has returned to the system before, so this is for copies of large tensors, which are
    mapped on their own.
    """
    gc.collect()
    RESET.write_text("5")  # sets the peak to the current size
    before, files_before = _status("VmRSS"), _status("RssFile")
    action()
    return _status("VmHWM") - before - max(0, _status("RssFile") - files_before)


class MallocInfo(Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        ("arena_to_hblks", c_size_t * 4), ("hblkhd", c_size_t), ("usmblks_fsmblks", c_size_t * 2),
        ("uordblks", c_size_t), ("fordblks_keepcost", c_size_t * 2),
    ]  # fmt: skip


def allocated_bytes() -> int:
    """The bytes that are allocated by malloc, of which tensors are made: no pages, no free memory."""
    mallinfo2 = CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """A run whose weights take 38 MB."""
    config = Config(
        model=ModelConfig(hidden_size=3072), optimizer=OptimizerConfig(name="adamw"), stream=StreamConfig(batch_size=2)
    )
    tokens = torch.zeros(1000, dtype=torch.uint8).numpy()
    dataset = Dataset(tokens, tokens[:0], VOCABULARY, {"tokens": 1000})
    return RunSpec(config, dataset, Folder(str(tmp_path)), None)


def state_after_a_step(spec: RunSpec) -> TrainState:
    state = build_train_state(spec, WORLD, "fp32")
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return state


def size_of_weights(state: TrainState) -> int:
    return sum(weight.nbytes for weight in state.model.parameters())


def test_save_copies_what_it_saves_once(spec: RunSpec) -> None:
    """Weights and two moments: 3 W, and no second copy to turn them into files."""
    events: list[Event] = []
    state = state_after_a_step(spec)
    writer = CheckpointWriter(spec, WORLD, events.append)

    def save() -> None:
        writer.save(state)
        writer.finish()

    assert peak_growth(save) < 4.5 * size_of_weights(state)
    assert len(events) == 1


@pytest.fixture
def saved(spec: RunSpec) -> tuple[RunSpec, int]:
    """The run with a checkpoint, and the size of its weights."""
    events: list[Any] = []
    state = state_after_a_step(spec)
    writer = CheckpointWriter(spec, WORLD, events.append)
    writer.save(state)
    writer.finish()
    commit_checkpoint(spec.checkpoints, events[0].receipt.checkpoint, [events[0].receipt])
    return spec, size_of_weights(state)


def test_resume_takes_what_it_reads_once(saved: tuple[RunSpec, int]) -> None:
    """Weights and two moments, which become the worker's own."""
    (spec, size), states = saved, []

    def resume() -> None:
        resume_point, _, precision = agree_on_resume_point(spec, WORLD)
        states.append(build_train_state(spec, WORLD, precision, resume_point))

    assert peak_growth(resume) < 4.5 * size
    assert states[0].optimizer.state_dict()["state"]


def test_driver_reads_weights_once_and_no_optimizer(saved: tuple[RunSpec, int]) -> None:
    spec, size = saved
    checkpoints = []
    assert peak_growth(lambda: checkpoints.append(find_latest_valid(spec.checkpoints))) < 0.9 * size
    folder = not_none(checkpoints[0][0]).path

    def load() -> None:
        loaded = open_checkpoint(folder)
        load_model(loaded)
        weights_sha256(loaded.weights)

    assert peak_growth(load) < 1.7 * size


class ConstantModel(torch.nn.Module):
    """Predicts the same token always. ``sizes`` are the allocated bytes at its first call and after each 1000 more."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([[[0.0, 1.0]]]))
        self.rnn = self.linear = torch.nn.Identity()
        self.calls, self.sizes = 0, list[int]()

    def forward(self, tokens_TB: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.calls % 1000 == 0:
            self.sizes.append(allocated_bytes())
        self.calls += 1
        return self.logits, state


@pytest.mark.skipif(not hasattr(CDLL(None), "mallinfo2"), reason="glibc before 2.33")
def test_generation_holds_no_memory_for_each_token() -> None:
    """A tensor for each token took 700 MB for the longest sample."""
    model, length = ConstantModel(), 20_001
    tokens = continue_greedily(Ensemble([cast(LanguageModel, model)]), torch.tensor([0]), [None], length)
    assert tokens.sum() == length
    assert len(model.sizes) == 21
    assert max(model.sizes[2:]) - model.sizes[1] < 100 * length  # of a tensor at least 300


def test_read_tokens_of_a_long_prefix_takes_the_memory_of_a_short_one() -> None:
    """All hidden states and logits of these tokens would take 100 and 800 MB."""
    ensemble = Ensemble([build_model(ModelConfig(hidden_size=32, embedding_size=8), 1000, 0)])
    ids = np.zeros(200_000, np.int32)
    read_tokens(ensemble, ids[:5000])
    assert peak_growth(lambda: read_tokens(ensemble, ids)) < 20 << 20


@pytest.mark.skipif(load_library() is None, reason=f"no kernel: {unavailable_reason()}")
def test_output_layer_kernel_with_many_tokens_holds_a_block_of_logits() -> None:
    """All logits, or their gradient, would take 360 MB."""
    hidden, weight = torch.ones(1, 3000, 32, requires_grad=True), torch.ones(30_000, 32, requires_grad=True)
    bias, targets = torch.zeros(30_000, requires_grad=True), torch.zeros(1, 3000, dtype=torch.int64)
    assert peak_growth(lambda: linear_cross_entropy(hidden, weight, bias, targets).backward()) < 100 << 20  # type: ignore[no-untyped-call]
