"""The share of a GPU's peak speed that training reaches, where that peak is known."""

from job.training.events import Started

# Products of dense matrices in 10¹² operations per second, by a part of the GPU's name; source: NVIDIA's data sheets.
_PEAKS = {
    "bf16": {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0},
    "fp32": {"H200": 67.0, "H100 PCIe": 51.0, "H100": 67.0, "A100": 19.5, "L40S": 91.6, "L4": 30.3, "T4": 8.1},
}
_OPERATIONS = 6  # per weight and token: a multiplication and an addition, forward once and backward twice


def share_of_peak(started: Started, tokens_per_second: float) -> float | None:
    """Returns the operations per second in matrix products as a share of what all workers could do, or None."""
    peaks = [peak for name, peak in _PEAKS.get(started.precision, {}).items() if name in started.device]
    if not peaks or not started.num_multiplied:
        return None
    return _OPERATIONS * started.num_multiplied * tokens_per_second / (peaks[0] * 1e12 * started.workers)
