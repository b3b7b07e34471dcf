"""Choosing a batch size: the rule of thumb, and measuring. Floor F3."""

from __future__ import annotations

SMALL_SET = 2000
SMALLEST, LARGEST = 64, 512
STEPS_PER_EPOCH = 30


def rule_of_thumb(m: int) -> tuple[int, str]:
    """The chapter's rule: a small set whole, a larger one in powers of two from 64 to 512. Returns size and reason.

    `m`: samples. Of the powers of two, the largest one that leaves about 30 steps in an epoch.

    >>> rule_of_thumb(500)[0], rule_of_thumb(2000)[0], rule_of_thumb(100_000)[0]
    (500, 64, 512)
    """
    if m < SMALL_SET:
        return m, f"fewer than {SMALL_SET} samples are taken whole"
    size = SMALLEST
    while size < LARGEST and m / (2 * size) >= STEPS_PER_EPOCH:
        size *= 2
    return size, f"the largest power of two up to {LARGEST} with about {STEPS_PER_EPOCH} steps or more in an epoch"
