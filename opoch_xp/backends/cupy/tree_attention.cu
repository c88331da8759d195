// Groups of queries against the trees of runs of chunks: the treecode's steps 1 to 5, chosen and read on the device.
//
// What: opoch_xp/backends/generic/tree.py, tree_attention. Level by level from the coarsest: `node_masses` (log masses of a
// group's candidates), `pick_nodes` (the group's shares, the nodes it opens). Then `own_cells` (each query's own cells) and
// `attend_lists`: one online softmax over what is left of all levels, the group's cells and each query's own (tile.cuh).
// Cost a query: m * 2 d multiply-adds for m candidate nodes, m * e for their values, (near + own) * leaf * (d + e) for keys;
// the masses are written once and read three times, 4 * m numbers: about what multiplying them again would cost.
// Groups of one batch share a row of the lists; a group whose run is shorter leaves its end empty, and a tile of nothing
// is skipped. own = 0 launches no `own_cells` and compiles the own part out.
// Source: Barnes and Hut, A hierarchical force-calculation algorithm, 1986 (the tree); Derrida, Random-energy model, 1981
// (the mass of a cell).
//
// Letters: F groups of g queries, W candidates of all levels side by side, of which a level has the columns from `column`
// on; C opened nodes at most. S, what queries and cells are stored in; T, what everything else is: float32 for 16 bits.
// index (F, g): flat rows of the queries, -1 is padding; first, count (F,): each group's run of chunks; nodes: of a chunk,
// at this level. rows (R, 2 d + e): summaries of all levels; logs (R,): ln of their keys.
// far (F, W): rows of `rows` that stand in for their keys, -1 for none; mass (F, g, W); opened (F, C): nodes numbered from
// the first chunk of the run; amount (F,): how many.

#include "tile.cuh"

// Candidates of a group at a level: all nodes of its run at the coarsest (no `opened`), else the children of those opened.
__device__ __forceinline__ i64 candidates(const i64* opened, const int* amount, const i64* count, i64 group, int nodes,
                                          int children) {
  return opened ? (i64)amount[group] * children : count[group] * nodes;
}

// Number of candidate j from the first chunk of the run on; C numbers a row of `opened`.
__device__ __forceinline__ i64 candidate(const i64* opened, i64 group, int C, int children, i64 j) {
  return opened ? opened[group * C + j / children] * children + j % children : j;
}

// ln of the sum of exp(logit) over the keys of a node: dot the logit of their mean, sigma2 its variance, log = ln n.
template <class T> __device__ __forceinline__ T log_mass(T dot, T sigma2, T log) {
  const bool liquid = sigma2 <= 2 * log || log == 0;
  return dot + (liquid ? log + sigma2 / 2 : root(2 * log * sigma2));
}

// far and mass of one level. Grid: groups, tiles of candidates, tiles of queries.
template <class T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 2 : 4)
    node_masses(const T* queries, const i64* index, const i64* first, const i64* count, const T* rows, const T* logs,
                const i64* opened, const int* amount, i64* far, T* mass, int g, int W, int C, int column,
                int nodes, int children, i64 offset, int dim, int width, T scale) {
  extern __shared__ __align__(16) char shared[];
  const i64 group = blockIdx.x;
  const int low = blockIdx.y * BK, high = blockIdx.z * BQ;
  const i64 there = candidates(opened, amount, count, group, nodes, children);
  if (low >= there) return;
  i64* row = (i64*)shared;                  // [BQ]
  const T** mean = (const T**)(row + BQ);   // [BK]
  const T** var = mean + BK;                // [BK]
  T* log = (T*)(var + BK);                  // [BK]
  T* q = log + BK;                          // [d][BQ]
  T* slab = q + dim * BQ;                   // [SLAB][PITCH]
  if (threadIdx.x < BQ) {
    const int i = high + threadIdx.x;
    row[threadIdx.x] = i < g ? index[group * g + i] : -1;
  }
  if (threadIdx.x < BK) {
    const i64 j = low + threadIdx.x;
    i64 node = -1;
    if (j < there) {
      node = offset + first[group] * nodes + candidate(opened, group, C, children, j);
      if (high == 0) far[group * W + column + j] = node;
    }
    mean[threadIdx.x] = node < 0 ? nullptr : rows + node * (2 * dim + width);
    var[threadIdx.x] = node < 0 ? nullptr : mean[threadIdx.x] + dim;
    log[threadIdx.x] = node < 0 ? -infinity<T>() : logs[node];
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
      const T one = log[c] == -infinity<T>() ? log[c] : log_mass(dot[r][i], sigma2[r][i], log[c]);
      mass[(group * g + query) * W + column + low + c] = one;
    }
}

constexpr int PICKERS = 256;

// The nodes a group opens: those with the largest share of its queries' mass. norm (F, g) is the largest lse so far, votes
// (F, g); share (F, M) scratch; given (F, C) nodes to open instead, or null. Leaves `far` without them. A block a group.
template <class T>
__global__ void __launch_bounds__(PICKERS, 2)
    pick_nodes(const T* mass, const T* votes, const i64* count, const i64* before, const int* amount_before,
               const i64* given, T* norm, T* share, i64* far, i64* opened, int* amount, int g, int W, int M, int C,
               int C_before, int column, int nodes, int children, int width) {
  const i64 group = blockIdx.x;
  const int there = (int)candidates(before, amount_before, count, group, nodes, children);
  const int picks = smaller(width, there), lane = threadIdx.x % LANES;
  mass += group * g * W + column;
  far += group * W + column;
  norm += group * g;
  votes += group * g;
  share += group * M;
  opened += group * C;
  for (int i = threadIdx.x / LANES; i < g; i += PICKERS / LANES) {
    T high = -infinity<T>(), sum = 0;
    for (int j = lane; j < there; j += LANES) high = larger(high, mass[(i64)i * W + j]);
    high = max_over(high, LANES);
    const T shift = high == -infinity<T>() ? (T)0 : high;
    for (int j = lane; j < there; j += LANES) sum += exponential(mass[(i64)i * W + j] - shift);
    sum = sum_over(sum, LANES);
    if (lane == 0 && high > -infinity<T>()) norm[i] = larger(norm[i], shift + logarithm(sum));
  }
  __syncthreads();
  for (int j = threadIdx.x; j < there; j += PICKERS) {
    T sum = 0;
    for (int i = 0; i < g; i++)
      if (votes[i] > 0 && norm[i] > -infinity<T>()) sum += votes[i] * exponential(mass[(i64)i * W + j] - norm[i]);
    share[j] = sum;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < there; j += PICKERS) {
    const i64 number = candidate(before, group, C_before, children, j);
    int place = -1;
    if (given) {
      for (int i = 0; i < picks; i++)
        if (given[group * C + i] == number) place = i;
    } else {
      int heavier = 0;
      for (int i = 0; i < there; i++) heavier += share[i] > share[j] || (share[i] == share[j] && i < j);
      place = heavier < picks ? heavier : -1;
    }
    if (place < 0) continue;
    opened[place] = number;
    far[j] = -1;
  }
  if (threadIdx.x == 0) amount[group] = picks;
}

// Each query's own cells (F, g, own), numbered as `opened`, -1 for none: of those left at the finest level the ones of
// largest mass, whose mass is set to -inf; `given` ones instead, where they are left. A warp a query.
template <class T>
__global__ void own_cells(T* mass, const i64* far, const i64* count, const i64* before, const int* amount_before,
                          const i64* given, i64* own, i64 queries, int g, int W, int C_before, int column, int nodes,
                          int children, int width) {
  const i64 query = (blockIdx.x * (i64)blockDim.x + threadIdx.x) / LANES, group = query / g;
  const int lane = threadIdx.x % LANES;
  if (query >= queries) return;
  const int there = (int)candidates(before, amount_before, count, group, nodes, children);
  mass += query * W + column;
  far += group * W + column;
  for (int o = 0; o < width; o++) {
    T best = -infinity<T>();
    int place = there;
    for (int j = lane; j < there; j += LANES) {
      if (far[j] < 0) continue;
      const i64 number = candidate(before, group, C_before, children, j);
      const bool wanted = !given || given[query * width + o] == number;
      if (wanted && mass[j] > best) best = mass[j], place = j;
    }
    const T most = max_over(best, LANES);
    const int mine = best == most && most > -infinity<T>() ? place : there;  // ties to the lower place
    const int winner = min_over(mine, LANES);
    __syncwarp();
    if (lane == 0) {
      own[query * width + o] = winner < there ? candidate(before, group, C_before, children, winner) : -1;
      if (winner < there) mass[winner] = -infinity<T>();
    }
    __syncwarp();
  }
}

__device__ __forceinline__ float to_number(float x) { return x; }
__device__ __forceinline__ double to_number(double x) { return x; }
__device__ __forceinline__ float to_number(f16 x) { return to_float(x); }
__device__ __forceinline__ float to_number(bf16 x) { return to_float(x); }

// Step 5: far nodes by their masses, the cells of the group, each query's own cells. cells (keys, d + e) of all chunks, kept
// (keys,) or null; per_chunk cells a chunk. Grid: groups, tiles of queries, parts of the value.
template <class S, int EP, bool OWN, class T = typename Accumulate<S>::type>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 8 ? 2 : 4)
    attend_lists(const S* queries, const i64* index, const i64* first, const T* rows, const i64* far, const T* mass,
                 const S* cells, const bool* kept, const i64* opened, const int* amount, const i64* own, T* out, T* lse,
                 int g, int W, int C, int own_width, int per_chunk, int leaf, int dim, int width, T scale) {
  extern __shared__ __align__(16) char shared[];
  const i64 group = blockIdx.x;
  const int low = blockIdx.y * BQ;
  Tile<S, EP> tile(shared, dim, width, blockIdx.z * EP, scale);
  if (threadIdx.x < BQ) {
    const int i = low + threadIdx.x;
    tile.row[threadIdx.x] = i < g ? index[group * g + i] : -1;
  }
  tile.begin(queries);
  for (int start = 0; start < W; start += BK) {
    i64 node = -1;
    if (threadIdx.x < BK) {
      const int j = start + threadIdx.x;
      node = j < W ? far[group * W + j] : -1;
      tile.values[threadIdx.x] = node < 0 ? nullptr : rows + node * (2 * dim + width) + 2 * dim;  // of T
    }
    if (!__syncthreads_or(node >= 0)) continue;
    for (int at = threadIdx.x; at < BQ * BK; at += THREADS) {
      const int i = at / BK, c = at % BK;
      const bool there = tile.values[c] && tile.row[i] >= 0;
      tile.weight[i * PITCH + c] = there ? mass[(group * g + low + i) * W + start + c] : -infinity<T>();
    }
    tile.template fold<T>();
  }
  const i64 base = first[group] * per_chunk;  // cells
  const int near = amount[group] * leaf;
  for (int start = 0; start < near; start += BK) {
    if (threadIdx.x < BK) {
      const int c = start + threadIdx.x;
      const i64 key = c < near ? (base + opened[group * C + c / leaf]) * leaf + c % leaf : -1;
      const bool there = key >= 0 && (!kept || kept[key]);
      tile.keys[threadIdx.x] = there ? cells + key * (dim + width) : nullptr;
      tile.values[threadIdx.x] = there ? tile.keys[threadIdx.x] + dim : nullptr;
    }
    __syncthreads();
    tile.logits([](int, int) { return true; });
    tile.fold();
  }
  if (OWN) {
    const int lane = threadIdx.x % LANES, columns = own_width * leaf;
    for (int start = 0; start < columns; start += BK) {
      // the key of column c for query i, -1 for none
      const auto key_of = [&](int i, int c) -> i64 {
        if (start + c >= columns || tile.row[i] < 0) return -1;
        const i64 cell = own[(group * g + low + i) * own_width + (start + c) / leaf];
        const i64 key = (base + cell) * leaf + (start + c) % leaf;
        return cell < 0 || (kept && !kept[key]) ? -1 : key;
      };
      for (int at = threadIdx.x / LANES; at < BQ * BK; at += THREADS / LANES) {  // a warp a pair
        const int i = at / BK, c = at % BK;
        const i64 key = key_of(i, c);
        T dot = key < 0 ? -infinity<T>() : (T)0;
        if (key >= 0) {
          for (int b = lane; b < dim; b += LANES)
            dot += tile.products.query(i, b, scale) * to_number(cells[key * (dim + width) + b]);
          dot = sum_over(dot, LANES);
        }
        if (lane == 0) tile.weight[i * PITCH + c] = dot;
      }
      tile.rescale();
      for (int r = 0; r < tile.products.ROWS; r++)
        for (int c = 0; c < BK; c++) {
          const int query = tile.products.row(r);
          const i64 key = key_of(query, c);
          if (key < 0) continue;
          const T weight = tile.weight[query * PITCH + c];
          const S* value = cells + key * (dim + width) + dim;
          for (int i = 0; i < tile.products.COLUMNS; i++) {
            const int b = tile.column + tile.products.column(i);
            if (b < width) tile.products.sum(r, i) += weight * to_number(value[b]);
          }
        }
      __syncthreads();
    }
  }
  tile.finish(out, lse);
}
