// Attention inside shared buckets: one table a launch, each pair in the first table where it collides.
//
// What: opoch_xp/backends/generic/buckets.py. The queries of a table are sorted by where their bucket starts, so that BQ
// neighbours read the same run of sorted keys; a pair counts where the key's place lies within the query's run and within
// none of its runs in the tables before. State (sum of values, largest logit, sum of weights, keys read) stays in memory
// from table to table.
// Cost: (d + e) multiply-adds for every pair of the runs that BQ neighbours cover, and one look-up of a rank per key and
// table before; the state, e + 3 numbers a query, is read and written once a table.
//
// Letters: N flat queries (N, d), M flat keys (M, d) and values (M, e), tables t. at (N,): queries in the order of this table;
// order (M,): keys sorted by bucket; starts, stops (tables, N): each query's run; ranks (tables, M): place of each key.
// tops, totals (parts of a value, N), out (N, e): the state.

#include "tile.cuh"

template <class T, int EP>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 2 : 4)
    attend_buckets(const T* queries, const T* keys, const T* values, const i64* at, const i64* order, const i64* starts,
                   const i64* stops, const i64* ranks, T* out, T* tops, T* totals, i64* read, i64 N, i64 M, int table, int dim,
                   int width, T scale) {
  extern __shared__ __align__(16) char shared[];
  Tile<T, EP> tile(shared, dim, width, blockIdx.y * EP, scale);
  i64* number = (i64*)(shared + ((char*)(tile.keep + BQ) - shared + 7) / 8 * 8);  // [BK]: the keys of a tile
  u32* counted = (u32*)(number + BK);                                             // [BQ]
  i64 mine = -1;
  if (threadIdx.x < BQ) {
    const i64 place = blockIdx.x * (i64)BQ + threadIdx.x;
    mine = place < N ? at[place] : -1;
    tile.row[threadIdx.x] = mine;
    counted[threadIdx.x] = 0;
  }
  tops += blockIdx.y * N, totals += blockIdx.y * N;
  tile.resume(queries, out, tops, totals);
  i64 low = M, high = 0;
  for (int i = 0; i < BQ; i++) {
    if (tile.row[i] < 0) continue;
    const i64 start = starts[table * N + tile.row[i]], stop = stops[table * N + tile.row[i]];
    if (start < stop) low = smaller(low, start), high = larger(high, stop);
  }
  for (i64 start = low; start < high; start += BK) {
    if (threadIdx.x < BK) {
      const i64 place = start + threadIdx.x, key = place < high ? order[place] : -1;
      number[threadIdx.x] = key;
      tile.keys[threadIdx.x] = key < 0 ? nullptr : keys + key * dim;
      tile.values[threadIdx.x] = key < 0 ? nullptr : values + key * width;
    }
    __syncthreads();
    tile.logits([&](int query, int c) {
      const i64 row = tile.row[query], place = start + c;
      if (row < 0 || place < starts[table * N + row] || place >= stops[table * N + row]) return false;
      for (int t = 0; t < table; t++) {
        const i64 rank = ranks[t * M + number[c]];
        if (rank >= starts[t * N + row] && rank < stops[t * N + row]) return false;
      }
      return true;
    });
    __syncthreads();
    if (threadIdx.x < BQ) {
      u32 sum = 0;
      for (int c = 0; c < BK; c++) sum += tile.weight[threadIdx.x * PITCH + c] != -infinity<T>();  // NaN was read
      counted[threadIdx.x] += sum;
    }
    tile.fold();
  }
  if (mine >= 0 && blockIdx.y == 0) read[mine] += counted[threadIdx.x];
  tile.suspend(out, tops, totals);
}
