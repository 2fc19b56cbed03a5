"""What all workers of a run share."""

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
    init: bytes | None  # a safetensors file with the first weights
