// The k best of each query's candidates by exact score: what a search in an index ends with.
//
// What: opoch_xp/backends/generic/search.py. A block holds a query's k best so far in shared memory, in order, and takes
// its candidates BATCH at a time: a warp a candidate for the dot product, rows read where they lie; a batch of which none
// beats the k-th is done with. Otherwise every entry's rank among the k and the batch is counted, which needs no atomics
// and puts equal scores in the order of their places. DENSE: every vector of a run of columns is a candidate, and its
// score is read from a matrix product; the k best go on from block to block of columns.
// Cost: d multiply-adds and d numbers of x a candidate, or one number of the product; (k + BATCH) BATCH comparisons for a
// batch that changes anything, of which there are about k ln(candidates / k) / BATCH and the first ones.
//
// Letters: m queries (m, d), n vectors x (n, d), bias (n,) or null. Candidates of query i: places[offsets[i] ...
// offsets[i + 1]); DENSE: the columns [first, first + columns), scores (m, columns). allowed (n,) or null. best, place
// (m, k): read and written, -inf and -1 where there is none.

#include "numbers.cuh"

constexpr int SEARCHERS = 128, BATCH = 128;

// Whether one entry comes before another; no entry has place -1.
template <class T> __device__ __forceinline__ bool before(T a, i64 at, T b, i64 bt) {
  return at >= 0 && (bt < 0 || a > b || (a == b && at < bt));
}

template <class T, bool DENSE>
__global__ void __launch_bounds__(SEARCHERS, 4)
    best_candidates(const T* q, const T* x, const T* bias, const i64* offsets, const i64* places, const bool* allowed,
                    const T* scores, T* best, i64* place, i64 first, i64 columns, int dim, int k) {
  extern __shared__ __align__(16) char shared[];
  i64* number = (i64*)shared;             // [2][k]: places of the best, now and after
  i64* fresh = number + 2 * k;            // [BATCH]: places of the batch
  T* score = (T*)(fresh + BATCH);         // [2][k]
  T* found = score + 2 * k;               // [BATCH]
  T* row = found + BATCH;                 // [d]: the query
  const i64 query = blockIdx.x;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  for (int i = threadIdx.x; i < k; i += SEARCHERS) {
    score[i] = best[query * k + i];
    number[i] = place[query * k + i];
  }
  for (int c = threadIdx.x; c < dim; c += SEARCHERS) row[c] = q[query * dim + c];
  __syncthreads();
  const i64 start = DENSE ? 0 : offsets[query], stop = DENSE ? columns : offsets[query + 1];
  int now = 0;  // which half of number and score holds the best
  for (i64 low = start; low < stop; low += BATCH) {
    if (DENSE) {
      const i64 j = low + threadIdx.x, vector = first + j;
      const bool there = j < stop && (!allowed || allowed[vector]);
      fresh[threadIdx.x] = there ? vector : -1;
      found[threadIdx.x] = there ? scores[query * columns + j] + (bias ? bias[vector] : (T)0) : -infinity<T>();
    } else {
      for (int i = warp; i < BATCH; i += SEARCHERS / LANES) {
        i64 vector = low + i < stop ? places[low + i] : -1;
        if (vector >= 0 && allowed && !allowed[vector]) vector = -1;
        T dot = 0;
        if (vector >= 0)
          for (int c = lane; c < dim; c += LANES) dot += row[c] * x[vector * dim + c];
        dot = sum_over(dot, LANES);
        if (lane == 0) {
          fresh[i] = vector;
          found[i] = vector < 0 ? -infinity<T>() : dot + (bias ? bias[vector] : (T)0);
        }
      }
    }
    __syncthreads();
    const T* score_now = score + now * k;
    const i64* number_now = number + now * k;
    const bool better =
        before(found[threadIdx.x], fresh[threadIdx.x], score_now[k - 1], number_now[k - 1]);
    if (!__syncthreads_or(better)) continue;
    T* score_after = score + (1 - now) * k;
    i64* number_after = number + (1 - now) * k;
    for (int i = threadIdx.x; i < k + BATCH; i += SEARCHERS) {
      const T mine = i < k ? score_now[i] : found[i - k];
      const i64 mine_at = i < k ? number_now[i] : fresh[i - k];
      if (i >= k && mine_at < 0) continue;
      int rank = i < k ? i : 0;
      for (int j = 0; j < BATCH; j++) rank += before(found[j], fresh[j], mine, mine_at);
      if (i >= k)
        for (int j = 0; j < k; j++) rank += before(score_now[j], number_now[j], mine, mine_at);
      if (rank < k) {
        score_after[rank] = mine;
        number_after[rank] = mine_at;
      }
    }
    now = 1 - now;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < k; i += SEARCHERS) {
    best[query * k + i] = score[now * k + i];
    place[query * k + i] = number[now * k + i];
  }
}
