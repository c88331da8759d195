// Exact attention in O(n) memory, and the merging of parts over different keys.
//
// What: opoch_xp/backends/generic/exact.py. A block takes BQ queries of one head and EP columns of their values past all
// keys they see, BK at a time (tile.cuh); keys after the last query of a block are never read.
// Cost: n_q * n_k * (d + e) multiply-adds (half of them causal, and the logits again for every EP columns); a block reads
// its keys and values once, so device memory is n_q / BQ times their bytes, mostly from the L2 cache. 16-bit inputs go
// through tensor cores; out and lse are float32 then.
// Source: Dao, FlashAttention-2, 2023.
//
// Letters: B batch entries, R queries' heads to one of keys, d = dim, e = width. q (B, R, n_q, d), k (B, n_k, d),
// v (B, n_k, e), mask (B, n_k) or null, last (n_q,) or null, out (B, R, n_q, e), lse (B, R, n_q).

#include "tile.cuh"

template <class S, int EP, class A = typename Accumulate<S>::type>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 8 ? 2 : 4)
    exact_attention(const S* q, const S* k, const S* v, const bool* mask, const i64* last, A* out, A* lse, i64 repeat,
                    i64 n_q, i64 n_k, int dim, int width, A scale, int causal) {
  extern __shared__ __align__(16) char shared[];
  const i64 tiles = (n_q + BQ - 1) / BQ, head = blockIdx.x / tiles, batch = head / repeat;
  const i64 first = blockIdx.x % tiles * BQ;
  Tile<S, EP> tile(shared, dim, width, blockIdx.y * EP, scale);
  if (threadIdx.x < BQ) {
    const i64 i = first + threadIdx.x;
    tile.row[threadIdx.x] = i < n_q ? head * n_q + i : -1;
    tile.limit[threadIdx.x] = i >= n_q ? 0 : !causal ? n_k : smaller(n_k, (last ? last[i] : i + n_k - n_q) + 1);
  }
  tile.begin(q);
  i64 stop = 0;
  for (int i = 0; i < BQ; i++) stop = larger(stop, tile.limit[i]);
  for (i64 start = 0; start < stop; start += BK) {
    if (threadIdx.x < BK) {
      const i64 j = start + threadIdx.x, at = batch * n_k + j;
      const bool there = j < n_k && (!mask || mask[at]);
      tile.keys[threadIdx.x] = there ? k + at * dim : nullptr;
      tile.values[threadIdx.x] = there ? v + at * width : nullptr;
    }
    __syncthreads();
    tile.logits([&](int query, int c) { return start + c < tile.limit[query]; });
    tile.fold();
  }
  tile.finish(out, lse);
}

// Rows [start, start + rows) of each head of out (heads, n_q, e) and lse (heads, n_q) take in a part (heads, rows, e) with
// its lse (heads, rows); a warp a row. Cost: 3 e + 3 numbers of device memory a row.
template <class T>
__global__ void merge_part(T* out, T* lse, const T* part, const T* part_lse, i64 heads, i64 n_q, i64 rows, i64 start,
                           int width) {
  const i64 warp = (blockIdx.x * (i64)blockDim.x + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES;
  if (warp >= heads * rows) return;
  const i64 at = warp / rows * n_q + start + warp % rows;
  const T a = lse[at], b = part_lse[warp];
  const T top = a > b || b != b ? a : b, shift = top == -infinity<T>() ? (T)0 : top;
  const T mine = exponential(a - shift), theirs = exponential(b - shift), total = mine + theirs;
  const T safe = total != 0 ? total : (T)1;
  for (int c = lane; c < width; c += LANES)
    out[at * width + c] = out[at * width + c] * (mine / safe) + part[warp * width + c] * (theirs / safe);
  __syncwarp();
  if (lane == 0) lse[at] = total != 0 ? shift + logarithm(safe) : -infinity<T>();
}
