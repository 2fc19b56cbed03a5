"""The specification of a run, shared by all workers."""

from dataclasses import dataclass

from job.config.schema import Config
from job.data.dataset import Dataset
from job.storage import Folder


@dataclass(frozen=True)
class RunSpec:
    """Everything that defines a run, complete and checked: each worker gets the same one."""

    config: Config
    dataset: Dataset
    checkpoints: Folder
    init: bytes | None  # content of model.init: a safetensors file with the initial weights
    in_trial: bool = False  # it belongs to a search, whose trials sample no text and are not tracked
