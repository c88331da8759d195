"""The cases of every kernel, in small odd sizes."""

from functools import cache

from opoch_xp.testing.case import Case
from opoch_xp.testing.cases.buckets import bucket_cases, hash_cases
from opoch_xp.testing.cases.exact import exact_cases, merge_cases
from opoch_xp.testing.cases.search import candidate_cases, search_cases, sort_cases
from opoch_xp.testing.cases.trees import attention_cases, group_cases, tree_cases

_OF = {
    "exact_attention": exact_cases,
    "hash_codes": hash_cases,
    "bucket_attention": bucket_cases,
    "build_tree": tree_cases,
    "query_groups": group_cases,
    "tree_attention": attention_cases,
    "merge_part": merge_cases,
    "sort_tables": sort_cases,
    "find_candidates": candidate_cases,
    "search_buckets": search_cases,
}


@cache
def cases_of(kernel: str) -> tuple[Case, ...]:
    """The cases of a kernel; none of synchronize, which computes nothing."""
    return tuple(_OF[kernel]()) if kernel in _OF else ()
