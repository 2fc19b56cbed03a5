"""Files of the state of models after a prefix, from which generation continues.

A safetensors file: ``token``, the last token of the prefix, and ``M.state.N``, tensor N of the state of model M before
that token. Its metadata has the digests of the models' weights, and one of the file's tensors.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from job.errors import UserError, error_origin, report_os_error
from job.inference.ensemble import Ensemble
from job.nn.state import State
from job.storage import Folder
from job.training.checkpoint import weights_sha256
from job.training.tensor_file import read_tensors, tensor_file

_FORMAT = "lanes generation state 1"


@dataclass(frozen=True)
class SavedState:
    """The state after a prefix.

    Args:
        states: of each model, a lane each, before the last token of the prefix
        token: the id of that token
    """

    states: list[State]
    token: int


def check_no_file(path: str) -> None:
    """Raises UserError if ``generate.save_state`` names a file that exists, or a folder that does not."""
    if not path:
        return
    file = Folder.resolve(path)
    with report_os_error(f"generate.save_state = {path}: cannot be written"):
        if file.parent.has(file.name):
            raise UserError(f"generate.save_state = {path}: exists", "choose another file, or remove it")
        if file.parent.local_path and not file.parent.exists():
            raise UserError(f"generate.save_state = {path}: its folder does not exist", "create it")


def write_state(path: str, state: SavedState, digests: list[str]) -> None:
    """Writes the state after a prefix to ``generate.save_state``. Raises UserError if that fails.

    Args:
        path: of the file
        state: the state of a lane
        digests: ``weights_sha256`` of each model
    """
    tensors = {"token": torch.tensor([state.token])}
    for number, model_state in enumerate(state.states):
        tensors |= {f"{number}.state.{index}": tensor for index, tensor in enumerate(_as_tuple(model_state))}
    metadata = {"format": _FORMAT, "weights": json.dumps(digests), "sha256": weights_sha256(tensors)}
    file = Folder.resolve(path)
    with report_os_error(f"generate.save_state = {path}: cannot be written"):
        file.parent.write(file.name, *tensor_file(tensors, metadata))


def read_state(path: str, ensemble: Ensemble, digests: list[str]) -> SavedState:
    """Reads the file that ``generate.load_state`` names.

    Args:
        path: of the file
        ensemble: the models, in the order in which they were saved
        digests: ``weights_sha256`` of each model

    Raises:
        UserError: it cannot be read, is damaged, or was saved with other models
    """
    file = Folder.resolve(path)
    with error_origin(f"generate.load_state = {path}"), report_os_error("cannot be read"):
        tensors, metadata = file.parent.read_with(file.name, read_tensors)
        if metadata.get("format") != _FORMAT:
            raise UserError("is not a file that generate.save_state wrote")
        if metadata.get("sha256") != weights_sha256(tensors):
            raise UserError("is damaged: its checksum is wrong", "save the state again")
        if metadata.get("weights") != json.dumps(digests):
            raise UserError("was saved with other models", "give the runs that saved it, in the same order")
        return _parse_state(tensors, ensemble)


def _parse_state(tensors: dict[str, Tensor], ensemble: Ensemble) -> SavedState:
    """Raises UserError if tensors are missing, or not as the models need them."""
    token = tensors.get("token", torch.empty(0))
    if token.dtype != torch.int64 or token.shape != (1,) or not 0 <= int(token) < ensemble.vocabulary_size:
        raise UserError("is not valid: its token is not in the vocabulary")
    states: list[State] = []
    for number, expected in enumerate(ensemble.advance(token[None], [None] * len(ensemble.models))):
        found = [tensors.get(f"{number}.state.{index}") for index in range(len(_as_tuple(expected)))]
        state = [tensor for tensor in found if tensor is not None]
        if state and [(x.shape, x.dtype) for x in state] != [(x.shape, x.dtype) for x in _as_tuple(expected)]:
            raise UserError("is not valid: its tensors are not those of the model")
        states.append((tuple(state) if isinstance(expected, tuple) else state[0]) if state else None)
    return SavedState(states, int(token))


def _as_tuple(state: State) -> tuple[Tensor, ...]:
    if state is None:
        return ()
    return state if isinstance(state, tuple) else (state,)
