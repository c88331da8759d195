"""For authors of backends."""

from opoch_xp.testing.arrays import Library, namespace
from opoch_xp.testing.compare import DECISIONS_GIVEN, assert_close, difference, relative_error, rounding
from opoch_xp.testing.inputs import MANY, clustered, qkv, whole

__all__ = [
    "DECISIONS_GIVEN",
    "MANY",
    "Library",
    "assert_close",
    "clustered",
    "difference",
    "namespace",
    "qkv",
    "relative_error",
    "rounding",
    "whole",
]
