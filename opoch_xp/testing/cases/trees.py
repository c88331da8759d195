"""Cases of build_tree, query_groups and tree_attention."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from opoch_xp.backends.generic import build_tree, query_groups
from opoch_xp.backends.generic.tree import tree_lists
from opoch_xp.methods import Treecode
from opoch_xp.testing.calls import Call, Parts
from opoch_xp.testing.case import Case, Words
from opoch_xp.testing.cases.search import exactly
from opoch_xp.testing.compare import DECISIONS_GIVEN, budget
from opoch_xp.testing.inputs import whole
from opoch_xp.treecode.plan import group_count, splits
from opoch_xp.treecode.tree import Lists

Array = np.ndarray
METHOD = Treecode(rtol=0.3, block=32, fan=4, leaf=4, branch=4, top=3, group=16, least=1)
TIERS = (METHOD.block, METHOD.block * METHOD.fan)  # keys of a chunk: two levels of nodes, and three
SCALE = 0.4


def trees(seed: int, chunks: int, size: int, method: Treecode = METHOD, hidden: bool = False) -> Call:
    """A call of build_tree on normal keys, with the order that the twin finds; `hidden`: under a mask that keeps two
    thirds of the keys, and none of the last chunk's."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((chunks, size, 6)), rng.standard_normal((chunks, size, 5))
    mask = None
    if hidden:
        mask = rng.random((chunks, size)) < 2 / 3
        mask[-1] = False
        k, v = k * mask[..., None], v * mask[..., None]
    axes = rng.standard_normal((splits(size, method.leaf), 6))
    order = build_tree(k, v, axes, method, mask=mask).order
    return Call("build_tree", {"k": k, "v": v, "axes": axes, "method": method, "mask": mask, "order": order})


def close(q: Array, k: Array, v: Array) -> Callable[[str], float]:
    """The tolerance of sums over these queries, keys and values."""
    return lambda dtype: DECISIONS_GIVEN if dtype == "float64" else budget(q, k, v, SCALE, dtype)


def tree_cases() -> Iterator[Case]:
    sums = "rows in the order given, and each node's mean key, variance, mean value and count of kept keys"
    for size in (METHOD.leaf, *TIERS):
        for hidden in (False, True):
            call = trees(size, 3, size, hidden=hidden)
            name = f"chunks of {size} keys{' under a mask' if hidden else ''}, order given"
            k, v, order = (call.arguments[key] for key in ("k", "v", "order"))
            mistakes = {"takes order for where each row goes": call.but(order=np.argsort(order, axis=1))}
            yield Case(name, sums, call, close(k, k, v), mistakes)
    halves = "every node is halved at the median projection on its axis, which iterations=0 leaves as given"
    split = "order lists every row of a chunk once, hidden ones last in every split; and sums as above"
    ties = "equal projections are split in equal halves: order lists every row of a chunk once"
    for size, hidden in ((TIERS[0], False), (TIERS[1], True)):
        call = trees(size + 1, 3, size, replace(METHOD, iterations=0), hidden)
        k, v, mask, order = (call.arguments[key] for key in ("k", "v", "mask", "order"))
        free = call.but(order=None)
        name = f"chunks of {size} keys{' under a mask' if hidden else ''}"
        rule = partial(_same_cells, order, METHOD.leaf, mask)
        yield Case(f"{name}, axes given", halves, free, close(k, k, v), own="order", rule=rule, wide=True)
        free, rule = free.but(method=METHOD), partial(_order, size, METHOD.leaf, mask)
        yield Case(name, split, free, close(k, k, v), own="order", rule=rule)
        stretch = np.exp2(np.arange(18) % 7 - 3.0).reshape(3, 6)
        along = call.but(order=None, stretch=stretch)
        cells = build_tree(**along.arguments).order
        rule = partial(_same_cells, cells, METHOD.leaf, mask)
        name_ = f"{name}, axes given, stretched"
        yield Case(name_, halves, along, close(k, k, v), own="order", rule=rule, wide=True)
        equal = free.but(k=whole(size, 1, 1, 6) + np.repeat(whole(size, 3, size // 4, 6), 4, axis=1), mask=None)
        rule = partial(_order, size, METHOD.leaf, None)
        yield Case(f"{name}, many equal", ties, equal, close(4 * k, 4 * k, v), own="order", rule=rule)


def _order(size: int, leaf: int, mask: Array | None, parts: Parts) -> Words:
    order = parts["order"]
    wrong = np.argwhere(np.sort(order, axis=1) != np.arange(size))
    if len(wrong):
        chunk = wrong[0][0]
        numbers, times = np.unique(order[chunk], return_counts=True)
        lost = np.setdiff1d(np.arange(size), numbers)
        twice = f"{numbers[times > 1][:5].tolist()} are there more than once"
        return "order does not list every row once", f"chunk {chunk}: rows {lost[:5].tolist()} are missing, {twice}"
    if mask is None:
        return "", ""
    kept = np.take_along_axis(mask, order, axis=1).reshape(len(mask), -1, leaf).sum(2)
    wanted = np.clip(mask.sum(1)[:, None] - leaf * np.arange(kept.shape[1]), 0, leaf)
    wrong = np.argwhere(kept != wanted)
    if not len(wrong):
        return "", ""
    chunk, cell = wrong[0].tolist()
    figures = f"chunk {chunk}: cell {cell} holds {kept[chunk, cell]} kept keys instead of {wanted[chunk, cell]}"
    return "hidden keys do not sort last", figures


def _same_cells(expected: Array, leaf: int, mask: Array | None, parts: Parts) -> Words:
    """Whether each cell of `leaf` rows holds the kept rows that it should; `hidden` stands for any that is hidden."""
    words, hidden = _order(expected.shape[1], leaf, mask, parts), -1
    orders = [parts["order"], expected]
    if mask is not None:
        orders = [np.where(np.take_along_axis(mask, x, axis=1), x, hidden) for x in orders]
    cells = [np.sort(x.reshape(len(x), -1, leaf), axis=2) for x in orders]
    differ = np.argwhere((cells[0] != cells[1]).any(axis=2))
    if words[0] or not len(differ):
        return words
    chunk, cell = differ[0].tolist()
    rows, instead = (x[chunk, cell].tolist() for x in cells)
    return "nodes are not halved at the median", f"chunk {chunk}, cell {cell} holds rows {rows} instead of {instead}"


def group_cases() -> Iterator[Case]:
    once = "groups lists every query once; group * groups - n numbers of n and more, all in the last group, are padding"
    halves = (
        "every node is halved at the median projection, which iterations=0 leaves as given, and all but the last full"
    )
    for n, group in ((37, 16), (64, 16), (5, 16), (33, 8), (7, 1)):
        rng = np.random.default_rng(n)
        queries, axes = rng.standard_normal((3, n, 6)), rng.standard_normal((splits(n, group), 6))
        spoilt, equal = queries.copy(), whole(n, 3, n, 6) * (np.arange(n) % 3 > 0)[:, None]
        spoilt[1, 3, 2] = np.nan
        method = replace(METHOD, group=group)
        call = Call("query_groups", {"queries": queries, "axes": axes, "method": method})
        free, rule = replace(method, iterations=0), partial(_groups, n, group)
        name = f"{n} queries in groups of {group}"
        expected = query_groups(queries, axes, free)
        same = partial(_groups, n, group, expected=expected)
        yield Case(f"{name}, axes given", halves, call.but(method=free), exactly, own="groups", rule=same, wide=True)
        stretched = call.but(method=free, stretch=np.exp2(np.arange(18) % 7 - 3.0).reshape(3, 6))
        same = partial(_groups, n, group, expected=query_groups(**stretched.arguments))
        yield Case(f"{name}, axes given, stretched", halves, stretched, exactly, own="groups", rule=same, wide=True)
        yield Case(name, once, call, exactly, own="groups", rule=rule)
        yield Case(f"{name}, one not a number", once, call.but(queries=spoilt), exactly, own="groups", rule=rule)
        yield Case(f"{name}, many equal", once, call.but(queries=equal), exactly, own="groups", rule=rule)


def _groups(n: int, group: int, parts: Parts, expected: Array | None = None) -> Words:
    groups = parts["groups"]
    for task, rows in enumerate(groups):
        counts = np.bincount(rows[(rows >= 0) & (rows < n)], minlength=n)
        if (counts != 1).any():
            wrong = np.flatnonzero(counts != 1)
            return "groups do not list every query once", f"task {task}: queries {wrong[:5].tolist()}"
        if (rows < 0).any() or (rows[: n // group * group] >= n).any():
            return "padding is not in the last group alone", f"task {task}: {rows.tolist()}"
    if expected is None or group == 1:
        return "", ""
    size = groups.shape[1] // group_count(n, group)
    sets = [np.sort(np.where(x < n, x, n).reshape(len(x), -1, size), axis=2) for x in (groups, expected)]
    differ = np.argwhere((sets[0] != sets[1]).any(axis=2))
    if not len(differ):
        return "", ""
    task, number = differ[0].tolist()
    rows, instead = (x[task, number].tolist() for x in sets)
    return "nodes are not halved at the median", f"task {task}, group {number}: {rows} instead of {instead}"


def attention(
    name: str, sentence: str, tree: Call, n: int, first: list[int], count: list[int], *, method: Treecode = METHOD,
    lists: bool = False, spoilt: int | None = None, known: float | None = None,
) -> Case:  # fmt: skip
    """A case of tree_attention; `lists`: the twin's are given; `spoilt`: a query that is not a number; `known`: the log
    mass that every query has read."""
    rng, starts, counts = np.random.default_rng(n), np.array(first), np.array(count)
    queries, axes = rng.standard_normal((len(first), n, 6)), rng.standard_normal((splits(n, method.group), 6))
    seen = np.where(rng.random((len(first), n)) < 0.3, -np.inf, 2 * rng.standard_normal((len(first), n)))
    if known is not None:
        seen = np.full_like(seen, known)
    if spoilt is not None:
        queries[:, spoilt] *= 8  # it would open much, if it could
        queries[0, spoilt, 1] = np.nan
    k, v = (np.concatenate(tree.arguments[key]) for key in ("k", "v"))
    groups = query_groups(queries, axes, method)
    built = build_tree(**tree.arguments)
    given = {"queries": queries, "first": starts, "count": counts, "groups": groups, "method": method, "scale": SCALE}
    with np.errstate(all="ignore"):
        found = tree_lists(**given, tree=built, seen=seen) if lists else None
    call = Call("tree_attention", {**given, "tree": tree, "seen": seen, "lists": found})
    wide = not lists and method.rtol > 0
    return Case(name, sentence, call, close(queries, k, v), _mistakes(call, len(tree.arguments["k"])), wide=wide)


def _mistakes(call: Call, chunks: int) -> dict[str, Call]:
    given = call.arguments
    first, count, groups, lists, method = (given[key] for key in ("first", "count", "groups", "lists", "method"))
    n, found = given["queries"].shape[1], {}
    if given["tree"].arguments["mask"] is not None:
        found["ignores the mask"] = call.but(tree=given["tree"].but(mask=None))
    if ((first + count < chunks) | (count == 0)).all():
        found["reads the chunks after those of the task: an offset is off by one"] = call.but(first=first + (count > 0))
    if (count > 1).any():
        found["reads one chunk too few"] = call.but(count=count - (count > 1), lists=None)
    if (groups >= n).any() and lists is None:
        found["padding of the groups votes, as the last query"] = call.but(groups=np.where(groups >= n, n - 1, groups))
        longer = np.zeros((len(first), groups.shape[1], given["queries"].shape[2]))
        longer[:, :n] = given["queries"]
        unseen = np.full(longer.shape[:2], -np.inf)
        unseen[:, :n] = given["seen"]
        found["padding of the groups votes, as a query of zeros"] = call.but(queries=longer, seen=unseen)
    if lists is not None:
        every = Lists(lists.opened, lists.cells, np.ones_like(lists.reads))
        found["every query reads all cells of its group"] = call.but(lists=every)
    elif method.rtol:
        found["does not look at what was seen before"] = call.but(seen=np.full_like(given["seen"], -np.inf))
        found["opens no large node for its size"] = call.but(method=replace(method, least=0))
        found["adds the threshold up over the nodes, not in quadrature"] = call.but(
            method=replace(method, rtol=method.rtol / (count.max() * 2) ** 0.5)
        )
    found["scale is that of the head, not the one given"] = call.but(scale=given["queries"].shape[2] ** -0.5)
    return found


def attention_cases() -> Iterator[Case]:
    formula = "one softmax over the keys that a query reads and every other node as one key with its log mass"
    chosen = "a node is opened where what it may hold passes its share for some query; padding opens nothing"
    small, large = trees(1, 5, TIERS[0]), trees(2, 3, TIERS[1])
    yield attention("lists given", formula, small, 37, [0, 2], [3, 2], lists=True)
    yield attention("lists given, larger chunks", formula, large, 21, [0, 1], [2, 2], lists=True)
    hidden = trees(3, 4, TIERS[1], hidden=True)
    blind = f"{formula}; hidden keys weigh nothing, a task that sees none is zeros with lse -inf"
    yield attention("lists given, a mask", blind, hidden, 37, [0, 2], [3, 2], lists=True)
    yield attention("groups alone", chosen, small, 37, [0, 2], [3, 2])
    yield attention("groups alone, the last nearly empty", chosen, small, 33, [0, 2], [2, 2])
    yield attention("groups alone, larger chunks", chosen, large, 21, [0, 1], [2, 2])
    yield attention("groups alone, larger chunks and a mask", chosen, hidden, 37, [0, 3], [3, 1])
    coarse = "of large nodes the heaviest are opened, and nothing else"
    yield attention("large nodes", coarse, large, 21, [0, 1], [2, 2], method=replace(METHOD, least=2), known=20.0)
    runs = "task t reads the chunks from first[t] on, count[t] of them; none: zeros and lse -inf"
    yield attention("runs of any length", runs, small, 19, [0, 0, 2, 4, 1], [1, 4, 0, 1, 3])
    vote = "a query that is not a number spoils its own row, and opens nothing for its group"
    yield attention("a query that is not a number", vote, small, 21, [0, 2], [3, 2], spoilt=5)
    yield attention("fewer queries than a group", chosen, small, 5, [1], [4])
    yield attention("groups of one", chosen, small, 9, [1, 0], [3, 4], method=replace(METHOD, group=1))
    bound = "of what would be opened the `most` heaviest are, and read says of how many queries something was left"
    yield attention("at most three", bound, large, 21, [0, 1], [3, 2], method=replace(METHOD, most=3, least=4))
    full, whole_ = replace(METHOD, rtol=0.0), "everything opened is exact attention"
    yield attention("everything opened", whole_, hidden, 18, [0, 1], [2, 2], method=full)
