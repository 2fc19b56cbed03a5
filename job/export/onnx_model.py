"""A model as an ONNX file, which is compared with the model before anything is written.

Axes: T steps, B lanes, V tokens of the vocabulary.
"""

from typing import Any

import torch

from job.config.model import BUILTIN_CELLS, ModelConfig
from job.errors import UserError, import_optional
from job.export.onnx_graph import build_graph, state_sizes
from job.nn.language_model import LanguageModel
from job.nn.state import State

MAX_BYTES = (1 << 31) - (1 << 20)  # of weights: a file of protobuf is smaller than 2 GiB
CHECK_SHAPE = 8, 3  # steps and lanes
TOLERANCE = 1e-4  # of differences that rounding may make


def import_onnx() -> tuple[Any, Any]:
    """Returns the libraries onnx and onnxruntime. Raises UserError if one of them is not installed."""
    onnx, onnxruntime = (import_optional(name, "--format onnx") for name in ("onnx", "onnxruntime"))
    return onnx, onnxruntime


def check_can_export(model_config: ModelConfig) -> None:
    """Raises UserError if there is no graph of the cell, because it is the user's."""
    if model_config.cell not in BUILTIN_CELLS:
        problem = f"model.cell = {model_config.cell}: only built-in cells can be exported to ONNX"
        raise UserError(problem, "use --format hub, which needs no code of the cell")


def onnx_file(model: LanguageModel, model_config: ModelConfig) -> bytes:
    """Returns the content of ``model.onnx``: one step, with float32 weights and with the state as inputs and outputs.

    Args:
        model: on the CPU, in evaluation mode
        model_config: its configuration, with a built-in cell

    Raises:
        UserError: onnx or onnxruntime is not installed, the file would be too large, or ONNX Runtime computes
            other values than the model
    """
    onnx, onnxruntime = import_onnx()
    weights = model.state_dict()
    size = sum(4 * weight.numel() for weight in weights.values())
    if size > MAX_BYTES:
        raise UserError(f"--format onnx: the weights have {size:,} bytes, more than an ONNX file holds", "use hub")
    data: bytes = build_graph(onnx, model_config, weights, model.vocabulary_size, model.reset_token).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # threads of its own would wait for work by spinning
    options.log_severity_level = 3  # errors only: standard error is for the message of this program
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    difference = _compare(session, model, state_sizes(model_config))
    if not difference <= TOLERANCE:  # it may be NaN
        problem = f"--format onnx: ONNX Runtime differs from the model by {difference:.2g} of the largest value"
        raise UserError(problem, "use --format hub")
    return data


@torch.no_grad()
def _compare(session: Any, model: LanguageModel, sizes: dict[str, int]) -> float:
    """Returns by how much logits and states after a step differ, relative to the largest value of a tensor, or to 1.

    Each step begins with the state of the model, so that differences do not grow from step to step.
    """
    differences = []
    tokens_TB = torch.randint(model.vocabulary_size, CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
    tokens_TB[len(tokens_TB) // 2] = model.vocabulary_size - 1  # the separator, if there is one
    state: State = None
    tensors = [torch.zeros(tokens_TB.shape[1], size) for size in sizes.values()]
    for tokens_B in tokens_TB:
        feeds = {"tokens": tokens_B, **dict(zip(sizes, tensors, strict=True))}
        found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        logits_1BV, state = model(tokens_B[None], state)
        tensors = [layer.float() for tensor in (state if isinstance(state, tuple) else (state,)) for layer in tensor]
        for value, expected in zip(found, [logits_1BV[0].float(), *tensors], strict=True):
            differences.append((torch.from_numpy(value) - expected).abs().max() / expected.abs().max().clamp(min=1))
    return float(torch.stack(differences).max())
