// Groups of queries against the trees of runs of chunks: the treecode, decided and read on the device.
//
// What: opoch_xp/backends/generic/tree.py, tree_attention. Three kernels a level, from the coarsest: `node_masses` (of every
// candidate its log mass and the log of what it may hold), `pick_nodes` (all that each query knows of, the nodes its group
// opens, and of cells who reads them), `attend_lists` (one online softmax of tile.cuh, whose state waits in memory between
// levels: what is left closed, and last the cells, key by key, each for the queries that read it).
// A node has no mass for the queries that it is opened for: mass is -inf there, and that is who reads a cell.
// Cost a query: m * 2 d multiply-adds for m candidate nodes, m * e for their values, a cell's leaf * (d + e) wherever one of
// BQ neighbours of the group reads it; 2 m numbers written, 4 m read; the state, e + 2 numbers, once a level. A group's
// candidates are read by one block, which takes g * m / 256 steps, and (m / 256) * 64 more where it ranks them.
// Groups of one batch share the width of a level; a group that has fewer candidates leaves its end unwritten.
// Source: Barnes and Hut, A hierarchical force-calculation algorithm, 1986 (the tree); law.cuh (the masses).
//
// Letters: F groups of g queries of N; M candidates at most; C nodes opened above at most; e = width, d = dim. S, what
// queries and cells are stored in; T, what everything else is: float32 for 16 bits.
// index (F, g): flat rows of the queries, -1 is padding; rows (R, 2 d + e): summaries of the level; above (F, C): the rows of
// the nodes opened at the level above, of which amount_above (F,) are there and each has `each` candidates for children,
// a chunk being a node of the coarsest level's; node (F, M): rows of the candidates; mass, may (F, g, M).
// opened (F, M): rows of the nodes that are opened, or of cells their places among the candidates; amount (F,): how many.
// tops, totals (parts of a value, N), out (N, e): the state of the softmax.

#include "law.cuh"
#include "tile.cuh"

// node, mass and may of one level. counts (R,): kept keys, or null where each node has `size`. Grid: groups, tiles of
// candidates, tiles of queries.
template <class T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 2 : 4)
    node_masses(const T* queries, const i64* index, const T* rows, const T* counts, const i64* above,
                const int* amount_above, i64* node, T* mass, T* may, int g, int M, int C, int each, int size, int dim,
                int width, T scale) {
  extern __shared__ __align__(16) char shared[];
  const i64 group = blockIdx.x;
  const int low = blockIdx.y * BK, high = blockIdx.z * BQ, there = amount_above[group] * each;
  if (low >= there) return;
  i64* row = (i64*)shared;                  // [BQ]
  const T** mean = (const T**)(row + BQ);   // [BK]
  const T** var = mean + BK;                // [BK]
  Law<T>* law = (Law<T>*)(var + BK);        // [BK]
  T* q = (T*)(law + BK);                    // [d][BQ]
  T* slab = q + dim * BQ;                   // [SLAB][PITCH]
  if (threadIdx.x < BQ) {
    const int i = high + threadIdx.x;
    row[threadIdx.x] = i < g ? index[group * g + i] : -1;
  }
  if (threadIdx.x < BK) {
    const int j = low + threadIdx.x;
    i64 at = -1;
    if (j < there) {
      at = above[group * C + j / each] * each + j % each;
      if (high == 0) node[group * M + j] = at;
    }
    mean[threadIdx.x] = at < 0 ? nullptr : rows + at * (2 * dim + width);
    var[threadIdx.x] = at < 0 ? nullptr : mean[threadIdx.x] + dim;
    law[threadIdx.x] = law_of(at < 0 ? (T)0 : counts ? counts[at] : (T)size);
  }
  __syncthreads();
  load_queries(q, queries, row, dim, scale);
  __syncthreads();
  T dot[4][4], sigma2[4][4];
  multiply(dot, q, mean, dim, slab, false);
  multiply(sigma2, q, var, dim, slab, true);
  for (int r = 0; r < 4; r++)
    for (int i = 0; i < 4; i++) {
      const int query = high + 4 * (threadIdx.x / 16) + r, c = threadIdx.x % 16 + 16 * i;
      if (query >= g || low + c >= there) continue;
      const T one = log_mass(law[c], dot[r][i], sigma2[r][i]);
      const i64 at = (group * g + query) * M + low + c;
      mass[at] = one;
      may[at] = one + excess(law[c], sigma2[r][i]);
    }
}

constexpr int PICKERS = 256;
constexpr int WARPS = PICKERS / LANES;

// The sum over the block, for every thread; slots [WARPS].
__device__ __forceinline__ int block_sum(int x, int* slots) {
  x = sum_over(x, LANES);
  if (threadIdx.x % LANES == 0) slots[threadIdx.x / LANES] = x;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < WARPS; w++) sum += slots[w];
  __syncthreads();
  return sum;
}

// How many of the threads before this one say yes; `all`: how many of the block do.
__device__ __forceinline__ int yes_before(bool yes, int* slots, int& all) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const u32 votes = __ballot_sync(ALL, yes);
  if (lane == 0) slots[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1));
  all = 0;
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) before += slots[w];
    all += slots[w];
  }
  __syncthreads();
  return before;
}

// The place of `wanted` among the rows given, -1 where it is not.
__device__ __forceinline__ int listed(const i64* given, int count, i64 wanted) {
  for (int i = 0; i < count; i++)
    if (given[i] == wanted) return i;
  return -1;
}

// A number, as `ordered` has it, that at least `count` of x[0 .. n) reach, and as few more as can be.
template <class T> __device__ u64 reached(const T* x, int n, int count, int* slots) {
  u64 least = 0;
  for (u64 bit = 1ull << 63; bit; bit >>= 1) {
    int mine = 0;
    for (int j = threadIdx.x; j < n; j += PICKERS) mine += ordered(x[j]) >= (least | bit);
    const int reach = block_sum(mine, slots);
    if (reach >= count) least |= bit;
    if (reach == count) break;
  }
  return least;
}

// What each query of the group knows of: whole (g,), ln of what it read before, of what is closed so far, and of the
// candidates; +inf for a query without a vote, of which no node is a share. A warp a query.
template <class T>
__device__ void know(const i64* index, const bool* votes, const T* seen, const T* tops, const T* totals, const T* mass,
                     T* whole, int g, int M, int there) {
  const int lane = threadIdx.x % LANES;
  for (int i = threadIdx.x / LANES; i < g; i += WARPS) {
    const i64 row = index[i];
    const T* mine = mass + (i64)i * M;
    T high = row < 0 ? -infinity<T>() : larger(seen[row], tops[row]), sum = 0;
    for (int j = lane; j < there; j += LANES) high = larger(high, mine[j]);
    high = max_over(high, LANES);
    const T shift = high == -infinity<T>() ? (T)0 : high;
    for (int j = lane; j < there; j += LANES) sum += exponential(mine[j] - shift);
    sum = sum_over(sum, LANES);
    if (lane) continue;
    if (row >= 0) sum += exponential(seen[row] - shift) + totals[row] * exponential(tops[row] - shift);
    whole[i] = !votes[i] ? infinity<T>() : high == -infinity<T>() ? high : shift + logarithm(sum);
  }
}

// The nodes a group opens: those that may hold more than exp(threshold) of what a query of its votes (F, g) knows of; the
// `forced` heaviest whatever they hold; of these the `most` heaviest at most, 0 for no bound; ties to the lower place. Or
// the rows `given` (F, G). leaf: keys of a cell, 0 above the cells. A cell is read by the queries for which it passes, or
// by those that `reads` (F, g, G) says. seen (N,): what was read before; whole (F, g) and share (F, M) are scratch; read
// (F, 3): added to. A block a group.
template <class T>
__global__ void __launch_bounds__(PICKERS, 2)
    pick_nodes(const i64* index, const bool* votes, const T* seen, const T* tops, const T* totals, const T* threshold,
               const int* amount_above, const i64* node, const T* may, T* mass, const i64* given, const bool* reads,
               T* whole, T* share, i64* opened, int* amount, T* read, int g, int M, int G, int each, int forced, int most,
               int leaf) {
  extern __shared__ __align__(16) char shared[];
  int* slots = (int*)shared;  // [WARPS]
  const i64 group = blockIdx.x;
  const int there = amount_above[group] * each;
  const T least_share = threshold[group];
  index += group * g, votes += group * g, whole += group * g;
  mass += group * g * M, may += group * g * M;
  node += group * M, share += group * M, opened += group * M;
  if (given) given += group * G;
  if (reads) reads += group * g * G;
  know(index, votes, seen, tops, totals, (const T*)mass, whole, g, M, there);
  int voters = 0, wanted = 0, full = 0;
  for (int i = threadIdx.x; i < g; i += PICKERS) voters += votes[i];
  voters = block_sum(voters, slots);  // after its barriers `whole` is there
  for (int j = threadIdx.x; j < there; j += PICKERS) {
    T most_of = -infinity<T>();  // NaN counts for nothing
    for (int i = 0; i < g; i++) most_of = larger(may[(i64)i * M + j] - whole[i], most_of);
    share[j] = most_of;
    wanted += most_of > least_share;
    full += most_of > -infinity<T>();
  }
  wanted = block_sum(wanted, slots);
  int picks = larger(wanted, smaller(forced, block_sum(full, slots)));
  const bool bounded = !given && most && picks > most;
  if (bounded) picks = most;
  const bool ranked = !given && picks != wanted;  // otherwise those that pass are all
  const u64 lowest = ranked ? reached(share, there, picks, slots) : 0;
  int spare = 0;  // nodes of exactly this share that are still wanted
  if (ranked) {
    for (int j = threadIdx.x; j < there; j += PICKERS) spare += ordered(share[j]) > lowest;
    spare = picks - block_sum(spare, slots);
  }
  int before = 0, reading = 0, all = 0;
  for (int low = 0; low < there; low += PICKERS) {
    const int j = low + threadIdx.x;
    const int place = given && j < there ? listed(given, G, node[j]) : -1;
    const u64 mine = ranked && j < there ? ordered(share[j]) : 0;
    bool pass = given ? place >= 0 : !ranked && j < there && share[j] > least_share;
    if (ranked) {
      const bool tied = j < there && mine == lowest;
      pass = j < there && mine > lowest;
      const int rank = yes_before(tied, slots, all);
      if (tied && rank < spare) pass = true;
      spare -= all;
    }
    const int rank = yes_before(pass, slots, all);
    if (pass) {
      opened[before + rank] = leaf ? j : node[j];
      for (int i = 0; i < g; i++) {
        const i64 at = (i64)i * M + j;
        const bool reader = !leaf || (reads ? reads[(i64)i * G + place] : may[at] - whole[i] > least_share);
        if (!reader) continue;
        mass[at] = -infinity<T>();
        reading += votes[i];
      }
    }
    before += all;
  }
  reading = block_sum(reading, slots);
  if (threadIdx.x) return;
  amount[group] = before;
  read[group * 3] += (T)there * voters;
  if (leaf) read[group * 3 + 1] += (T)reading * leaf;
  if (bounded) read[group * 3 + 2] = (T)voters;
}

// The state of the softmax with what is closed of one level, by its mass; and if this is the finest, and `cells` are given,
// with the cells that are opened. cells (keys, d + e) of all chunks, kept (keys,) or null. Grid: groups, tiles of queries,
// parts of the value.
template <class S, int EP, class T = typename Accumulate<S>::type>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 8 ? 2 : 4)
    attend_lists(const S* queries, const i64* index, const int* amount_above, const T* rows, const i64* node,
                 const T* mass, const S* cells, const bool* kept, const i64* opened, const int* amount, T* out, T* tops,
                 T* totals, i64 N, int g, int M, int each, int leaf, int dim, int width, T scale) {
  extern __shared__ __align__(16) char shared[];
  const i64 group = blockIdx.x;
  const int low = blockIdx.y * BQ, there = amount_above[group] * each;
  if (!there) return;
  Tile<S, EP> tile(shared, dim, width, blockIdx.z * EP, scale);
  if (threadIdx.x < BQ) {
    const int i = low + threadIdx.x;
    tile.row[threadIdx.x] = i < g ? index[group * g + i] : -1;
  }
  tops += blockIdx.z * N, totals += blockIdx.z * N;
  node += group * M, opened += group * M, mass += (group * g + low) * M;
  tile.resume(cells ? queries : nullptr, out, tops, totals);
  for (int start = 0; start < there; start += BK) {
    if (threadIdx.x < BK) {
      const int j = start + threadIdx.x;
      tile.values[threadIdx.x] = j < there ? rows + node[j] * (2 * dim + width) + 2 * dim : nullptr;  // of T
    }
    __syncthreads();
    for (int at = threadIdx.x; at < BQ * BK; at += THREADS) {
      const int i = at / BK, c = at % BK;
      const bool pair = tile.values[c] && tile.row[i] >= 0;
      tile.weight[i * PITCH + c] = pair ? mass[(i64)i * M + start + c] : -infinity<T>();
    }
    tile.template fold<T>();
  }
  const int keys = cells ? amount[group] * leaf : 0;
  for (int start = 0; start < keys; start += BK) {
    const int query = threadIdx.x / 4, stop = smaller(start + BK, keys);
    u64 columns = 0;  // of the tile, which the query reads
    if (tile.row[query] >= 0)
      for (int cell = start / leaf + threadIdx.x % 4; cell * leaf < stop; cell += 4) {
        if (mass[(i64)query * M + opened[cell]] != -infinity<T>()) continue;
        const int from = larger(cell * leaf, start), to = smaller(cell * leaf + leaf, stop);
        columns |= ~0ull >> (BK - (to - from)) << (from - start);
      }
    columns = sum_over(columns, 4);
    if (threadIdx.x % 4 == 0) tile.limit[query] = (i64)columns;
    if (!__syncthreads_or(columns != 0)) continue;
    if (threadIdx.x < BK) {
      const int c = start + threadIdx.x;
      const i64 key = c < keys ? node[opened[c / leaf]] * leaf + c % leaf : -1;
      const bool some = key >= 0 && (!kept || kept[key]);
      tile.keys[threadIdx.x] = some ? cells + key * (dim + width) : nullptr;
      tile.values[threadIdx.x] = some ? tile.keys[threadIdx.x] + dim : nullptr;
    }
    __syncthreads();
    tile.logits([&](int i, int c) { return (u64)tile.limit[i] >> c & 1; });
    tile.fold();
  }
  tile.suspend(out, tops, totals);
}
