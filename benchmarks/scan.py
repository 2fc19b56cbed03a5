"""CPU time of minGRU's recurrence in a training step: the parallel scan against the loop over the steps.

python -m benchmarks.scan
"""

import sys
import time

import torch

from benchmarks import measure
from job.nn import scan

STEPS = (16, 35, 64, 128, 256, 1024)
LANES_UNITS = ((1, 256), (1, 1024), (8, 256), (16, 256), (32, 256), (32, 1024))
MAX_NUMBERS = 1 << 22
ROUNDS = 7


def milliseconds(steps: int, lanes: int, units: int, loop_steps: int) -> float:
    """The least CPU time of forward and backward pass. The loop is used for at most ``loop_steps``."""
    scan.LOOP_STEPS, scan.LOOP_NUMBERS = loop_steps, sys.maxsize
    decay = torch.rand(steps, lanes, units, requires_grad=True)
    inputs, h0 = torch.randn(steps, lanes, units, requires_grad=True), torch.zeros(lanes, units)
    gradient, times = torch.randn(steps, lanes, units), []
    for _ in range(ROUNDS):
        start = time.process_time()
        torch.autograd.grad(scan.linear_scan(decay, inputs, h0), (decay, inputs), gradient)
        times.append(time.process_time() - start)
    return min(times) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    print(f"{measure.machine()}\ntime of the scan / time of the loop\n")
    print("| steps |" + "".join(f" {lanes} × {units} |" for lanes, units in LANES_UNITS))
    print("| --: |" + " --: |" * len(LANES_UNITS))
    for steps in STEPS:
        cells = [
            milliseconds(steps, *size, 0) / milliseconds(steps, *size, sys.maxsize)
            if steps * size[0] * size[1] <= MAX_NUMBERS
            else None
            for size in LANES_UNITS
        ]
        print(f"| {steps} |" + "".join(" |" if ratio is None else f" {ratio:.2f} |" for ratio in cells), flush=True)


if __name__ == "__main__":
    main()
