"""Measuring a call: memory that was taken is seen, memory that was held before is not."""

import numpy as np
import pytest

from opoch_xp import measure


def test_what_a_call_takes_is_seen():
    held = np.ones(4_000_000)
    result, seconds, extra = measure.timed(lambda: np.ones(4_000_000).sum())
    assert result == held.sum()
    assert seconds > 0
    if extra is not None:
        assert extra == pytest.approx(32e6, rel=0.15)


def test_memory_freed_earlier_is_not_reused_unseen():
    if not measure.CLEAR.exists():
        pytest.skip("the system has no /proc: only the mark of the whole process can be read")
    pieces = [np.ones(100_000) for _ in range(40)]
    del pieces
    _, _, extra = measure.timed(lambda: [np.ones(100_000) for _ in range(40)])
    assert extra == pytest.approx(32e6, rel=0.15)


def test_where_the_mark_cannot_be_set_back(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CLEAR", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(measure, "STATUS", tmp_path / "none" / "status")
    marks = iter([100, 100, 100, 150])
    monkeypatch.setattr(measure, "_lifetime_mark", lambda: next(marks))
    assert measure.timed(lambda: 7)[2] is None  # the process was larger before: nothing can be said
    assert measure.timed(lambda: 7)[2] == 50


def test_the_machine_has_a_name():
    assert measure.cores() >= 1
    assert f"{measure.cores()} core" in measure.machine()
