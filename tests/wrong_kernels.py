"""Wrong kernels, each the generic twin but for one fault, and the words by which it must be refused."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest.mock import patch

import array_api_strict as strict
import numpy as np

from opoch_xp.backends import generic

CALLS = itertools.count()
Kernel = Callable[..., Any]


def twin(kernel: str) -> Callable[[Kernel], Kernel]:
    """A kernel made of its twin, the first argument: named and with the parameters of the twin."""

    def made(function: Kernel) -> Kernel:
        original = getattr(generic, kernel)

        @wraps(original)
        def changed(*given: Any, **options: Any) -> Any:
            return function(original, *given, **options)

        return changed

    return made


@twin("exact_attention")
def exact_one_key_too_many(attend: Kernel, q: Any, k: Any, v: Any, *, positions: Any = None, **options: Any) -> Any:
    last = np.arange(q.shape[2]) + k.shape[1] - q.shape[2] if positions is None else positions
    return attend(q, k, v, positions=last + 1, **options)


@twin("exact_attention")
def exact_aligned_top_left(attend: Kernel, q: Any, k: Any, v: Any, *, positions: Any = None, **options: Any) -> Any:
    return attend(q, k, v, positions=np.arange(q.shape[2]) if positions is None else positions, **options)


@twin("exact_attention")
def exact_biased(attend: Kernel, *given: Any, **options: Any) -> Any:
    out, lse = attend(*given, **options)
    return out, lse + 0.01


@twin("exact_attention")
def exact_scales_in_place(attend: Kernel, q: Any, k: Any, v: Any, *, scale: float, **options: Any) -> Any:
    q[...] = q * scale
    return attend(q, k, v, scale=1.0, **options)


@twin("exact_attention")
def exact_without_mask(attend: Kernel, *given: Any, mask: Any = None, **options: Any) -> Any:
    return attend(*given, **options)


@twin("exact_attention")
def exact_in_float64(attend: Kernel, q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(*(strict.astype(x, strict.float64) for x in (q, k, v)), **options)


@twin("exact_attention")
def exact_in_float32(attend: Kernel, q: Any, k: Any, v: Any, **options: Any) -> Any:
    found = attend(*(strict.astype(x, strict.float32) for x in (q, k, v)), **options)
    return tuple(strict.astype(x, q.dtype) for x in found)


@twin("exact_attention")
def exact_at_random(attend: Kernel, *given: Any, **options: Any) -> Any:
    out, lse = attend(*given, **options)
    return out * (1 + 1e-6 * next(CALLS)), lse


@twin("exact_attention")
def exact_but_the_tail(attend: Kernel, q: Any, *given: Any, **options: Any) -> Any:
    """Rows in fours; what is left over is never written."""
    out = strict.empty((*q.shape[:3], given[1].shape[2]), dtype=q.dtype, device=q.device)
    rows = q.shape[2] // 4 * 4
    whole, lse = attend(q, *given, **options)
    out[:, :, :rows, :] = whole[:, :, :rows, :]
    return out, lse


@twin("exact_attention")
def exact_with_zeros_at_the_tail(attend: Kernel, q: Any, *given: Any, **options: Any) -> Any:
    out, lse = attend(q, *given, **options)
    rows = q.shape[2] // 4 * 4
    out[:, :, rows:, :] = 0.0
    return out, lse


@twin("exact_attention")
def exact_on_the_host(attend: Kernel, *given: Any, **options: Any) -> Any:
    return tuple(np.from_dlpack(x) for x in attend(*given, **options))


@twin("exact_attention")
def exact_without_lse(attend: Kernel, *given: Any, **options: Any) -> Any:
    return attend(*given, **options)[0]


@twin("exact_attention")
def exact_without_empty_axes(attend: Kernel, q: Any, *given: Any, **options: Any) -> Any:
    if not q.size:
        raise ZeroDivisionError("division by zero")
    return attend(q, *given, **options)


def exact_without_positions(q: Any, k: Any, v: Any, *, causal: bool, scale: float, mask: Any = None) -> Any:
    return generic.exact_attention(q, k, v, causal=causal, scale=scale, mask=mask)


@twin("merge_part")
def merge_one_row_late(merge: Kernel, out: Any, lse: Any, part: Any, part_lse: Any, start: int) -> Any:
    return merge(out, lse, part, part_lse, min(start + 1, lse.shape[2] - part_lse.shape[2]))


@twin("merge_part")
def merge_into_the_part(merge: Kernel, out: Any, lse: Any, part: Any, part_lse: Any, start: int) -> Any:
    merged = merge(out, lse, part, part_lse, start)
    part[...] = merged[0][:, :, start : start + part.shape[2], :]
    return merged


@twin("hash_codes")
def hash_in_reverse(hashes: Kernel, x: Any, planes: Any) -> Any:
    return hashes(x, planes[:, ::-1])


@twin("hash_codes")
def hash_in_int32(hashes: Kernel, x: Any, planes: Any) -> Any:
    return strict.astype(hashes(x, planes), strict.int32)


@twin("hash_codes")
def hash_zero_as_negative(hashes: Kernel, x: Any, planes: Any) -> Any:
    return 2 ** planes.shape[1] - 1 - hashes(-x, planes)


@twin("bucket_attention")
def buckets_one_key_too_few(attend: Kernel, q: Any, k: Any, v: Any, codes: Any, key_codes: Any, **options: Any) -> Any:
    if options["causal"] and k.shape[1] > 1 and options["mask"] is None:
        k, v, key_codes = k[:, :-1, :], v[:, :-1, :], key_codes[:, :, :-1]
    return attend(q, k, v, codes, key_codes, **options)


@twin("bucket_attention")
def buckets_without_mask(attend: Kernel, *given: Any, mask: Any = None, **options: Any) -> Any:
    return attend(*given, **options)


@twin("build_tree")
def tree_on_another_device(build: Kernel, k: Any, v: Any, axes: Any, method: Any, **options: Any) -> Any:
    here = strict.Device("CPU_DEVICE")
    moved = {name: x if x is None else x.to_device(here) for name, x in options.items()}
    return build(k.to_device(here), v.to_device(here), axes, method, **moved)


@twin("build_tree")
def tree_of_equal_keys_twice(build: Kernel, k: Any, v: Any, axes: Any, method: Any, **options: Any) -> Any:
    """A rank that counts the smaller ones: equal keys get the same."""
    if options.get("order") is None:
        order = build(k, v, axes, method, **options).order
        equal = strict.all(k[:, :, None, :] == k[:, None, :, :], axis=-1)
        first = strict.argmax(strict.astype(equal, strict.int8), axis=-1)
        masked = options.get("mask") is not None
        options["order"] = order if masked else strict.take_along_axis(first, order, axis=1)
    return build(k, v, axes, method, **options)


@twin("build_tree")
def tree_without_splits(build: Kernel, k: Any, v: Any, axes: Any, method: Any, **options: Any) -> Any:
    if options.get("order") is None and options.get("mask") is None:
        rows = strict.arange(k.shape[1], dtype=strict.int64, device=k.device)
        options["order"] = strict.broadcast_to(rows, k.shape[:2])
    return build(k, v, axes, method, **options)


@twin("build_tree")
def tree_that_splits_hidden_keys(
    build: Kernel, k: Any, v: Any, axes: Any, method: Any, *, mask: Any = None, order: Any = None, stretch: Any = None
) -> Any:
    if order is None:
        order = build(k, v, axes, method, stretch=stretch).order
    return build(k, v, axes, method, mask=mask, order=order)


@twin("query_groups")
def groups_without_the_last(group: Kernel, queries: Any, axes: Any, method: Any, **options: Any) -> Any:
    groups = group(queries, axes, method, **options)
    return strict.where(groups == queries.shape[1] - 1, 0, groups)


@twin("tree_attention")
def trees_one_chunk_later(
    attend: Kernel, queries: Any, tree: Any, first: Any, count: Any, *rest: Any, **opts: Any
) -> Any:
    chunks = tree.order.shape[0]
    return attend(queries, tree, np.minimum(first + 1, chunks - count), count, *rest, **opts)


@twin("tree_attention")
def trees_biased(attend: Kernel, *given: Any, **options: Any) -> Any:
    part = attend(*given, **options)
    return replace(part, lse=part.lse + 0.01)


@twin("tree_attention")
def trees_with_votes_of_padding(
    attend: Kernel, queries: Any, tree: Any, first: Any, count: Any, groups: Any, *given: Any, **options: Any
) -> Any:
    groups = strict.where(groups < queries.shape[1], groups, queries.shape[1] - 1)
    return attend(queries, tree, first, count, groups, *given, **options)


@twin("tree_attention")
def trees_of_nothing_seen(attend: Kernel, *given: Any, seen: Any, **options: Any) -> Any:
    return attend(*given, seen=strict.full_like(seen, -strict.inf), **options)


@twin("tree_attention")
def trees_of_group_reads(attend: Kernel, *given: Any, lists: Any = None, **options: Any) -> Any:
    if lists is not None:
        lists = replace(lists, reads=strict.ones_like(lists.reads))
    return attend(*given, lists=lists, **options)


@twin("tree_attention")
def trees_without_large_nodes(
    attend: Kernel, queries: Any, tree: Any, first: Any, count: Any, groups: Any, method: Any, **options: Any
) -> Any:
    return attend(queries, tree, first, count, groups, replace(method, least=0), **options)


@twin("tree_attention")
def trees_of_mean_fields(attend: Kernel, queries: Any, tree: Any, *given: Any, **options: Any) -> Any:
    number = strict.arange(tree.summaries[0].shape[2], device=queries.device)
    var = (number >= tree.dim) & (number < 2 * tree.dim)
    return attend(
        queries, replace(tree, summaries=tuple(strict.where(var, 0.0, x) for x in tree.summaries)), *given, **options
    )


@twin("tree_attention")
def trees_that_hold_what_is_estimated(attend: Kernel, *given: Any, **options: Any) -> Any:
    with patch("opoch_xp.backends.generic.tree.excess", lambda sigma2, count: 0.0 * sigma2):
        return attend(*given, **options)


@twin("tree_attention")
def trees_with_thresholds_added_up(
    attend: Kernel, queries: Any, tree: Any, first: Any, count: Any, groups: Any, method: Any, **options: Any
) -> Any:
    method = replace(method, rtol=method.rtol / (max(1, count.max()) * 2) ** 0.5)
    return attend(queries, tree, first, count, groups, method, **options)


@twin("tree_attention")
def trees_without_a_bound(
    attend: Kernel, queries: Any, tree: Any, first: Any, count: Any, groups: Any, method: Any, **options: Any
) -> Any:
    return attend(queries, tree, first, count, groups, replace(method, most=None), **options)


@twin("tree_attention")
def trees_of_the_head_s_scale(attend: Kernel, queries: Any, *given: Any, scale: float, **options: Any) -> Any:
    return attend(queries, *given, scale=queries.shape[2] ** -0.5, **options)


@twin("build_tree")
def tree_of_half_the_variances(build: Kernel, *given: Any, **options: Any) -> Any:
    tree = build(*given, **options)
    number = strict.arange(tree.summaries[0].shape[2], device=tree.cells.device)
    var = (number >= tree.dim) & (number < 2 * tree.dim)
    parents = (strict.where(var, 0.5 * x, x) for x in tree.summaries[1:])
    return replace(tree, summaries=(tree.summaries[0], *parents))


@twin("query_groups")
def groups_not_stretched(group: Kernel, *given: Any, stretch: Any = None) -> Any:
    return group(*given)


@twin("build_tree")
def tree_not_stretched(build: Kernel, *given: Any, stretch: Any = None, **options: Any) -> Any:
    return build(*given, **options)


@twin("sort_tables")
def tables_with_ties_reversed(sort: Kernel, codes: Any, bits: int) -> Any:
    tables = sort(strict.flip(codes, axis=-1), bits)
    return type(tables)(bits, tables.codes, codes.shape[1] - 1 - tables.order)


@twin("find_candidates")
def candidates_without_limit(find: Kernel, tables: Any, codes: Any, limit: Any = None) -> Any:
    return find(tables, codes)


@twin("search_buckets")
def search_with_ties_reversed(search: Kernel, q: Any, x: Any, bias: Any, tables: Any, codes: Any, *rest: Any) -> Any:
    places, scores = search(q, x, bias, tables, codes, *rest)
    if places.shape[0] and places.shape[1] > 1:
        swap = strict.asarray(np.array([1, 0, *range(2, places.shape[1])]), device=places.device)
        tie = (scores[:, 0] == scores[:, 1])[:, None] & (places[:, 1] >= 0)[:, None]
        places = strict.where(tie, strict.take(places, swap, axis=1), places)
    return places, scores


@twin("search_buckets")
def search_without_filter(
    search: Kernel, q: Any, x: Any, bias: Any, tables: Any, codes: Any, k: int, *rest: Any
) -> Any:
    return search(q, x, bias, tables, codes, k, None, rest[1])


@twin("synchronize")
def waits_for_one(wait: Kernel, *arrays: Any) -> None:
    assert len(arrays) == 1


OFF_BY_ONE = "an offset is off by one"
WRONG = [
    (exact_one_key_too_many, f"exact_attention: a query sees one key too many: {OFF_BY_ONE}"),
    (exact_aligned_top_left, "exact_attention: query i sees keys up to i, not to i + n_k - n_q"),
    (exact_biased, "exact_attention: lse is too large by 0.01 everywhere: biased"),
    (exact_scales_in_place, "exact_attention: mutates its argument q"),
    (exact_without_mask, "exact_attention: ignores the mask"),
    (exact_in_float64, "exact_attention: out has dtype float64, expected float32"),
    (exact_in_float32, "exact_attention: out is not the twin's"),
    (exact_at_random, "exact_attention: is not deterministic"),
    (exact_but_the_tail, "exact_attention: out is not written everywhere"),
    (exact_with_zeros_at_the_tail, "exact_attention: out is wrong at the end of axis 2 alone"),
    (exact_on_the_host, "exact_attention: out is an array of numpy"),
    (exact_without_lse, "exact_attention: raises ValueError: 1 values were returned, expected 2: out, lse"),
    (exact_without_empty_axes, "exact_attention: raises ZeroDivisionError: division by zero"),
    (
        exact_without_positions,
        "exact_attention: has the signature (q, k, v, *, causal, scale, mask=None), expected (q, k,",
    ),
    (merge_one_row_late, f"merge_part: rows are merged one place too late: {OFF_BY_ONE}"),
    (merge_into_the_part, "merge_part: mutates its argument part"),
    (hash_in_reverse, "hash_codes: packs the bits in reverse"),
    (hash_in_int32, "hash_codes: codes has dtype int32, expected int64"),
    (hash_zero_as_negative, "hash_codes: codes is not the twin's"),
    (buckets_one_key_too_few, f"bucket_attention: a query sees one key too few: {OFF_BY_ONE}"),
    (buckets_without_mask, "bucket_attention: ignores the mask"),
    (
        tree_on_another_device,
        "build_tree: cells is on array_api_strict.Device('CPU_DEVICE'), the inputs are on array_api",
    ),
    (tree_of_equal_keys_twice, "build_tree: order does not list every row once\n  case: chunks of 32 keys, many equal"),
    (tree_without_splits, "build_tree: nodes are not halved at the median"),
    (tree_that_splits_hidden_keys, "build_tree: hidden keys do not sort last"),
    (groups_without_the_last, "query_groups: groups do not list every query once"),
    (trees_one_chunk_later, f"tree_attention: reads the chunks after those of the task: {OFF_BY_ONE}"),
    (trees_biased, "tree_attention: lse is too large by 0.01 everywhere: biased"),
    (trees_with_votes_of_padding, "tree_attention: padding of the groups votes, as the last query"),
    (trees_of_nothing_seen, "tree_attention: does not look at what was seen before"),
    (trees_of_group_reads, "tree_attention: every query reads all cells of its group"),
    (trees_without_large_nodes, "tree_attention: opens no large node for its size"),
    (trees_of_mean_fields, "tree_attention: out is not the twin's"),
    (trees_that_hold_what_is_estimated, "tree_attention: out is not the twin's"),
    (
        trees_with_thresholds_added_up,
        "tree_attention: adds the threshold up over the nodes, not in quadrature",
    ),
    (trees_without_a_bound, "tree_attention: out is not the twin's"),
    (trees_of_the_head_s_scale, "tree_attention: scale is that of the head, not the one given"),
    (tree_of_half_the_variances, "build_tree: summaries[1] is not the twin's"),
    (groups_not_stretched, "query_groups: nodes are not halved at the median"),
    (tree_not_stretched, "build_tree: nodes are not halved at the median"),
    (tables_with_ties_reversed, "sort_tables: equal codes do not come by position"),
    (candidates_without_limit, "find_candidates: ignores limit"),
    (search_with_ties_reversed, "search_buckets: equal scores do not come by place"),
    (search_without_filter, "search_buckets: ignores allowed"),
    (waits_for_one, "synchronize: raises AssertionError"),
]
