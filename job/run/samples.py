"""The texts that a run samples while it trains: the rows of ``samples.jsonl``."""

from collections.abc import Iterator
from typing import Any

from job.run.row_file import RowFile
from job.storage import Folder

SAMPLES_FILE = "samples.jsonl"
SAMPLES = RowFile(SAMPLES_FILE, "samples", "kind", texts=("prefix", "continuation"))


def read_samples(folder: Folder) -> Iterator[dict[str, Any]]:
    """Yields the samples of a run in order, of each kind and step one; raises OSError if they cannot be read.

    Returns:
        ``step``, ``epoch``, ``kind`` (``greedy`` or ``sampled``), ``prefix``, ``continuation`` and ``time``
    """
    return SAMPLES.read(folder)
