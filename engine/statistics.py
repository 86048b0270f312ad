"""How sure a number is."""

import math


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): right also for few questions and near 0 or 1."""
    z, share = 1.959964, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
