// Trees of equal chunks of keys: median splits by principal axes, cells, summaries.
//
// What: opoch_xp/backends/generic/tree.py, build_tree and principal_order. An axis is found by power iteration on at most
// 2 * SAMPLE evenly spaced rows of a node. Nodes of up to SPLIT_ROWS rows are finished by one block, all their levels: the
// order and the projections stay in shared memory, the rows are read where they lie (mostly in the L2 cache). The whole
// block splits a node while there are fewer nodes than warps; below, a warp a node. Larger nodes go level by level, whole
// device: `node_axes`, `project`, and a sort by the array library.
// A node is halved by counting, for each row, the rows that sort before it: no atomics, ties by position, the same result
// every time. Rows are split as if dimension c were multiplied by stretch[c]; of an axis of such rows that is kept times
// stretch, it is enough to multiply the start by it and each iterate by its square. Counting costs size^2 / threads steps a node, which for SPLIT_ROWS rows is less than reading them.
// Cost a chunk of n rows: n * d numbers a level for the projections and 2 * SAMPLE * d * (2 * iterations + 1) a node for the
// axes; n * (d + e) read and written for the cells, and 1 / leaf of (2 d + e) for the summaries.
//
// Letters: d = dim, e = width. x (chunks, n, d), kept (chunks, n) or null, order (chunks, n) rows of each chunk, stretch
// (chunks, d) or null for ones.

#include "numbers.cuh"

constexpr int SPLIT_THREADS = 256;
constexpr int SPLIT_WARPS = SPLIT_THREADS / LANES;
constexpr int SAMPLE = 128;

// The threads that split one node: a block or a warp.
struct Team {
  int rank, size;
  __device__ void sync() const {
    if (size == LANES)
      __syncwarp();
    else
      __syncthreads();
  }
};

// axis . (row - mean), mean zero where it is null.
template <class T> __device__ T projected(const T* row, const T* mean, const T* axis, int dim) {
  T sum = 0;
  for (int c = 0; c < dim; c++) sum += (row[c] - (mean ? mean[c] : (T)0)) * axis[c];
  return sum;
}

// Principal axis, times stretch and of largest entry 1, of the stretched rows x[order[0 .. size)], from `start`: what rows
// as they are need to be multiplied by. mean [d], dots [2 * SAMPLE] scratch.
template <class T, class Index>
__device__ void principal_axis(Team team, const T* x, const bool* kept, const Index* order, i64 size, int dim,
                               const T* start, const T* stretch, int iterations, T* axis, T* mean, T* dots) {
  const i64 stride = larger((i64)1, size / SAMPLE);
  const int count = (int)((size + stride - 1) / stride);
  for (int c = team.rank; c < dim; c += team.size) axis[c] = stretch ? start[c] * stretch[c] : start[c];
  if (iterations) {
    int seen = 0;
    for (int s = 0; s < count; s++) seen += !kept || kept[order[s * stride]];
    for (int c = team.rank; c < dim; c += team.size) {
      T sum = 0;
      for (int s = 0; s < count; s++) {
        const i64 row = order[s * stride];
        if (!kept || kept[row]) sum += x[row * dim + c];
      }
      mean[c] = sum / (T)larger(1, seen);
    }
  }
  team.sync();
  for (int iteration = 0; iteration < iterations; iteration++) {
    for (int s = team.rank; s < count; s += team.size) {
      const i64 row = order[s * stride];
      dots[s] = !kept || kept[row] ? projected(x + row * dim, mean, axis, dim) : (T)0;
    }
    team.sync();
    for (int c = team.rank; c < dim; c += team.size) {
      T sum = 0;
      for (int s = 0; s < count; s++) {
        const T dot = dots[s];
        if (dot != 0) sum += dot * (x[(i64)order[s * stride] * dim + c] - mean[c]);
      }
      axis[c] = stretch ? sum * (stretch[c] * stretch[c]) : sum;
    }
    team.sync();
    T largest = 0;
    for (int c = 0; c < dim; c++) largest = larger(largest, axis[c] < 0 ? -axis[c] : axis[c]);
    team.sync();
    if (largest > 0)
      for (int c = team.rank; c < dim; c += team.size) axis[c] /= largest;
    team.sync();
  }
}

// All levels of one node of `size` rows, a block: order (nodes, size) is changed in place; `per_chunk` nodes a chunk of
// `n` rows; starts (levels, d).
template <class T>
__global__ void __launch_bounds__(SPLIT_THREADS, 2)
    split_nodes(const T* x, const bool* kept, i64* order, const T* starts, const T* stretch, i64 n, i64 per_chunk,
                int size, int dim, int levels, int iterations) {
  extern __shared__ __align__(16) char shared[];
  u64* keys = (u64*)shared;            // [size]
  int* now = (int*)(keys + size);      // [size]
  int* next = now + size;              // [size]
  T* scratch = (T*)(next + size);      // [SPLIT_WARPS][2 d + 2 * SAMPLE]; size is even, so it is aligned
  const i64 chunk = blockIdx.x / per_chunk;
  x += chunk * n * dim;
  if (kept) kept += chunk * n;
  if (stretch) stretch += chunk * dim;
  order += blockIdx.x * (i64)size;
  for (int i = threadIdx.x; i < size; i += SPLIT_THREADS) now[i] = (int)order[i];
  __syncthreads();
  for (int level = 0; level < levels; level++) {
    const int nodes = 1 << level, width = size >> level;
    const bool alone = nodes >= SPLIT_WARPS;  // a warp a node
    const int warp = threadIdx.x / LANES;
    const Team team = {alone ? (int)threadIdx.x % LANES : (int)threadIdx.x, alone ? LANES : SPLIT_THREADS};
    T* axis = scratch + (alone ? warp * (2 * dim + 2 * SAMPLE) : 0);
    T *mean = axis + dim, *dots = mean + dim;
    for (int node = alone ? warp : 0; node < nodes; node += alone ? SPLIT_WARPS : 1) {
      const int first = node * width;
      principal_axis(team, x, kept, now + first, (i64)width, dim, starts + level * dim, stretch, iterations, axis, mean,
                     dots);
      for (int i = first + team.rank; i < first + width; i += team.size) {
        const bool there = !kept || kept[now[i]];
        keys[i] = ordered(there ? projected(x + (i64)now[i] * dim, (const T*)nullptr, axis, dim) : infinity<T>());
      }
      team.sync();
      for (int i = first + team.rank; i < first + width; i += team.size) {
        int before = 0;
        for (int j = first; j < first + width; j++) before += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
        next[first + before] = now[i];
      }
      team.sync();
    }
    __syncthreads();
    int* swap = now;
    now = next;
    next = swap;
  }
  for (int i = threadIdx.x; i < size; i += SPLIT_THREADS) order[i] = now[i];
}

// Axes (chunks * per_chunk, d) of larger nodes, a block each.
template <class T>
__global__ void __launch_bounds__(SPLIT_THREADS, 2)
    node_axes(const T* x, const bool* kept, const i64* order, const T* start, const T* stretch, T* axes, i64 n,
              i64 per_chunk, int dim, int iterations) {
  extern __shared__ __align__(16) char shared[];
  T* axis = (T*)shared;
  T *mean = axis + dim, *dots = mean + dim;
  const i64 chunk = blockIdx.x / per_chunk, size = n / per_chunk;
  const Team team = {(int)threadIdx.x, SPLIT_THREADS};
  principal_axis(team, x + chunk * n * dim, kept ? kept + chunk * n : nullptr, order + blockIdx.x * size, size, dim, start,
                 stretch ? stretch + chunk * dim : nullptr, iterations, axis, mean, dots);
  for (int c = threadIdx.x; c < dim; c += SPLIT_THREADS) axes[blockIdx.x * (i64)dim + c] = axis[c];
}

// Projections (chunks, n), in the order of `order`, of every row on its node's axis; a warp a row. Masked rows: infinity.
template <class T>
__global__ void project(const T* x, const bool* kept, const i64* order, const T* axes, T* projections, i64 rows, i64 n,
                        i64 per_chunk, int dim) {
  const i64 at = (blockIdx.x * (i64)blockDim.x + threadIdx.x) / LANES;
  if (at >= rows) return;
  const i64 row = at / n * n + order[at];
  const T* axis = axes + at / (n / per_chunk) * dim;
  T sum = 0;
  for (int c = threadIdx.x % LANES; c < dim; c += LANES) sum += x[row * dim + c] * axis[c];
  sum = sum_over(sum, LANES);
  if (threadIdx.x % LANES == 0) projections[at] = kept && !kept[row] ? infinity<T>() : sum;
}

// cells (chunks, n, d + e): keys and values side by side in the order of `order`; a thread a number.
template <class T>
__global__ void gather_cells(const T* k, const T* v, const i64* order, T* cells, i64 rows, i64 n, int dim, int width) {
  const i64 at = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = at / (dim + width);
  if (row >= rows) return;
  const int c = (int)(at % (dim + width));
  const i64 from = row / n * n + order[row];
  cells[at] = c < dim ? k[from * dim + c] : v[from * width + c - dim];
}

// Mean key, variance of the keys and mean value (nodes, 2 d + e) of `children` rows each; a thread a column of d + e.
// below: cells (rows, d + e), or the summaries (rows, 2 d + e) of the level below, `stride` numbers a row; weight (rows,)
// of each child, or null where all weigh the same.
template <class T>
__global__ void summarise(const T* below, const T* weight, T* summary, i64 nodes, int children, int stride, int dim,
                          int width) {
  const i64 at = blockIdx.x * (i64)blockDim.x + threadIdx.x, node = at / (dim + width);
  if (node >= nodes) return;
  const int c = (int)(at % (dim + width));
  const bool parents = stride == 2 * dim + width;
  below += node * children * stride;
  T total = 0;
  for (int j = 0; j < children; j++) total += weight ? weight[node * children + j] : (T)1;
  const T unit = total > 0 ? 1 / total : (T)0;
  const T* column = below + (c < dim || !parents ? c : c + dim);
  T mean = 0, var = 0;
  for (int j = 0; j < children; j++) mean += (weight ? weight[node * children + j] : (T)1) * unit * column[(i64)j * stride];
  summary += node * (2 * dim + width);
  if (c >= dim) {
    summary[dim + c] = mean;
    return;
  }
  for (int j = 0; j < children; j++) {
    const T apart = column[(i64)j * stride] - mean;
    const T inside = parents ? below[(i64)j * stride + dim + c] : (T)0;
    var += (weight ? weight[node * children + j] : (T)1) * unit * (inside + apart * apart);
  }
  summary[c] = mean;
  summary[dim + c] = var;
}
