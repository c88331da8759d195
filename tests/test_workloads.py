"""Workloads: shapes and seeds at any size, and that each is what its description says."""

import numpy as np
import pytest

from opoch_xp import workloads
from opoch_xp.measure import timed

MADE = [name for name in workloads.NAMES if name != "heads"]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("n", "dim", "heads"), [(1, 1, 1), (777, 5, 3), (workloads.ROWS + 1, 4, 1)])
def test_shapes_and_dtypes(name, n, dim, heads):
    for x in workloads.make(name, n, dim, heads):
        assert x.shape == (heads, n, dim)
        assert x.dtype == np.float32
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", MADE)
def test_a_seed_is_an_input(name):
    first, again, other = (workloads.make(name, 300, 8, seed=seed) for seed in (1, 1, 2))
    for x, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, same)
        assert not np.array_equal(x, different)


def test_topics_come_in_runs_and_scattered_do_not():
    def drift(name):  # how far a value's neighbour is, over how far values are from one another
        v = workloads.make(name, 64 * 50, 16)[2][0]
        return np.square(v[1:] - v[:-1]).mean() / (2 * v.var())

    assert drift("topics") < 0.6  # values are center + noise of the same size: half, and a little at the edges of runs
    assert drift("scattered") > 0.9


def test_topics_have_the_documented_spread():
    q, k, v = workloads.make("topics", 64 * 2000, 8)
    for x, variance in ((q, 1.5**2 + 0.5**2), (k, 1.5**2 + 0.5**2), (v, 2.0)):
        assert x.var() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("cosine", [0.5, 0.9, 1.0])
def test_every_needle_query_has_a_key_at_the_cosine_in_its_past(cosine):
    q, k, _ = (x[0] for x in workloads.make("needles", 400, 64, cosine=cosine))
    cosines = (q @ k.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=1)
    past = np.tril(np.ones((400, 400), bool))
    assert (np.abs(np.where(past, cosines, 9) - cosine).min(1) < 1e-5).all()


def test_most_of_the_mass_is_on_the_needle():
    q, k, _ = (x[0] for x in workloads.make("needles", 5000))
    logits = np.where(np.tril(np.ones((5000, 5000), bool)), q @ k.T / 8, -np.inf)
    weight = np.exp(logits - logits.max(1, keepdims=True))
    assert np.median(weight.max(1) / weight.sum(1)) > 0.9


def test_sinks_are_gaussian_but_for_four_keys_of_twenty_times_the_norm():
    plain, sinks = (workloads.make(name, 50, 8, heads=2) for name in ("gaussian", "sinks"))
    np.testing.assert_array_equal(sinks[0], plain[0])
    np.testing.assert_array_equal(sinks[2], plain[2])
    np.testing.assert_array_equal(sinks[1][:, 4:], plain[1][:, 4:])
    np.testing.assert_array_equal(sinks[1][:, :4], 20 * plain[1][:, :4])


def test_identical_tokens_are_identical_and_heads_are_not():
    for x in workloads.make("identical", 50, 8, heads=2):
        assert (x == x[:, :1]).all()
        assert not np.array_equal(x[0], x[1])


@pytest.mark.parametrize("name", MADE)
def test_memory_is_the_outputs_and_little_more(name):
    outputs = 3 * 300_000 * 32 * 4
    _, _, extra = timed(lambda: workloads.make(name, 300_000, 32))
    assert extra is None or extra < 1.3 * outputs


def test_heads_are_the_byte_model_s():
    q, k, v = workloads.make("heads", 40)
    assert q.shape == k.shape == v.shape == (16, 40, 64)
    some = workloads.make("heads", 40, heads=3)[0]
    np.testing.assert_array_equal(some, q[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "topic", "n": 10}, "must be one of topics, scattered, gaussian, needles, sinks, identical, heads"),
        ({"name": "topics", "n": 0}, "at least 1"),
        ({"name": "topics", "n": 3, "heads": 0}, "at least 1"),
        ({"name": "needles", "n": 3, "cosine": 1.5}, "cosine"),
        ({"name": "heads", "n": 65_537}, "refused above 65,536 tokens"),
        ({"name": "heads", "n": 10, "dim": 32}, "16 heads of 64"),
        ({"name": "heads", "n": 10, "heads": 17}, "16 heads of 64"),
    ],
)
def test_what_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        workloads.make(**arguments)


def test_a_stream_in_pieces_is_the_stream_at_once():
    whole, pieces = workloads.Stream(8, 2, seed=1), workloads.Stream(8, 2, seed=1)
    k, v = whole.tokens(3000)
    parts = []
    for n in (1, 0, 700, 2299):
        pieces.queries(3)  # which do not matter to keys and values
        parts.append(pieces.tokens(n))
    for x, some in zip((k, v), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(some, axis=1), x)
        assert x.dtype == np.float32
        assert not np.array_equal(x[0], x[1])
    assert not np.array_equal(k, workloads.Stream(8, 2, seed=2).tokens(3000)[0])


def test_topics_of_a_stream_stay_for_32_to_512_tokens():
    stream = workloads.Stream(64)
    k, v = (x[0] for x in stream.tokens(60_000))
    (centers,) = (head.centers for head in stream._heads)
    topic = np.argmax(k @ centers.T - 0.75 * np.square(centers).sum(1), axis=1)  # the nearest center
    runs = np.diff(np.flatnonzero(np.diff(topic)))
    assert 32 <= runs.min() < 60
    assert 480 < runs.max() <= 512
    assert runs.mean() == pytest.approx((32 + 512) / 2, rel=0.1)
    assert (k - 1.5 * centers[topic]).std() == pytest.approx(0.5, rel=0.01)
    assert (v - centers[topic]).std() == pytest.approx(1.0, rel=0.01)


def test_queries_of_a_stream_are_on_topics_of_their_own():
    stream = workloads.Stream(64, 2)
    q = np.concatenate([stream.queries(3) for _ in range(100)], axis=1)
    assert q.shape == (6, 100, 64)
    for number, head in enumerate(stream._heads):
        own = q[3 * number : 3 * number + 3].reshape(-1, 64)
        topic = np.argmax(own @ head.centers.T - 0.75 * np.square(head.centers).sum(1), axis=1)
        assert (own - 1.5 * head.centers[topic]).std() == pytest.approx(0.5, rel=0.02)
        assert len(set(topic.tolist())) > 200  # of 300, drawn among 1,024


@pytest.mark.parametrize("arguments", [{"dim": 0}, {"heads": 0}])
def test_streams_that_cannot_be_made(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        workloads.Stream(**arguments)
