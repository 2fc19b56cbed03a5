"""What a worker reads from its environment."""

import sys
from pathlib import Path

import pytest

from job.distributed.context import _cgroup_cpu_limit


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, sys.maxsize),
        ({"cpu.max": "max 100000"}, sys.maxsize),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, sys.maxsize),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_cgroup_cpu_limit_reads_quota_of_version_1_and_2(tmp_path: Path, files: dict[str, str], limit: int) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert _cgroup_cpu_limit(tmp_path) == limit
