"""For authors of backends: `check_backend(name)` holds a plugin to its contract; see docs/plugins.md.

What it compares with and by, of use in a plugin's own tests, is public too.
"""

from opoch_xp.backends import namespace
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.check import check_backend
from opoch_xp.testing.compare import DECISIONS_GIVEN, assert_close, budget, difference, relative_error, rounding
from opoch_xp.testing.inputs import MANY, clustered, qkv, whole
from opoch_xp.testing.report import BackendError, Check, Report

__all__ = [
    "DECISIONS_GIVEN",
    "MANY",
    "BackendError",
    "Check",
    "Library",
    "Report",
    "assert_close",
    "budget",
    "check_backend",
    "clustered",
    "difference",
    "namespace",
    "qkv",
    "relative_error",
    "rounding",
    "whole",
]
