"""Seconds per epoch, ours and those of other libraries, on one workload: `catopt-xp bench`.

`workload` says what is done, `contenders` who does it, `agreement` whether they all do the same, `floor` what this
machine could do at best, `table` times them side by side. The `gpu_` modules do the same on a GPU, as `stages` within a
deadline, each contender in a `worker` process (`benchmarks/gpu.py`).
"""

from __future__ import annotations
