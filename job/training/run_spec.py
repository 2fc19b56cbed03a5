"""What all workers of a run share."""

from dataclasses import dataclass
from typing import Any

from job.config.schema import Config
from job.data.vocabulary import Vocabulary
from job.storage import Folder


@dataclass(frozen=True)
class RunSpec:
    """What all workers of a run share."""

    config: Config
    vocabulary: Vocabulary
    checkpoints: Folder
    corpus: dict[str, Any]  # what a checkpoint records of the text
    init: bytes | None  # a safetensors file with the first weights
