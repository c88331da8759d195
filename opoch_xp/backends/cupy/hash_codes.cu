// Sign codes of rows: projection, sign and packing in one pass.
//
// What: code t of a row is sum_b 2^b [planes[t, b] . x >= 0]; opoch_xp/backends/generic/hashing.py. All planes are one flat
// list, so that tables of any bits fill the lanes: a warp multiplies 8 rows by 32 planes, a lane a plane, and one ballot a
// row packs 32 signs. The packed words of a row stay in shared memory until all planes are through; the codes are then
// runs of `bits` bits of them.
// Cost: n * tables * bits * d multiply-adds; x once per block of ROWS rows, the planes once per block (from the L2 cache),
// 8 bytes a code. Intermediate projections never leave the registers.
// Source: Charikar, Similarity estimation techniques from rounding algorithms, 2002.
//
// Letters: n rows, d = dim, P = tables * bits planes. x (n, d) in `batch` equal runs of `run` rows, planes (P, d),
// codes (batch, tables, run).

#include "numbers.cuh"

constexpr int WARPS = 8;
constexpr int EACH = 8;             // rows of a warp
constexpr int ROWS = WARPS * EACH;  // rows of a block
constexpr int DEPTH = 32;           // numbers of a row in shared memory at a time

template <class T>
__global__ void __launch_bounds__(WARPS* LANES, 2)
    hash_codes(const T* x, const T* planes, i64* codes, i64 n, i64 run, int dim, int tables, int bits) {
  extern __shared__ __align__(16) char shared[];
  T* rows = (T*)shared;                                  // [ROWS][DEPTH]
  T* normals = rows + ROWS * DEPTH;                      // [DEPTH][LANES + 1]
  u32* words = (u32*)(normals + DEPTH * (LANES + 1));    // [ROWS][number of words]
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int count = tables * bits, packed = (count + LANES - 1) / LANES;
  const i64 first = blockIdx.x * (i64)ROWS;
  for (int word = 0; word < packed; word++) {
    T dot[EACH] = {};
    for (int low = 0; low < dim; low += DEPTH) {
      for (int at = threadIdx.x; at < ROWS * DEPTH; at += WARPS * LANES) {
        const i64 row = first + at / DEPTH;
        const int c = low + at % DEPTH;
        rows[at] = row < n && c < dim ? x[row * dim + c] : (T)0;
      }
      for (int at = threadIdx.x; at < LANES * DEPTH; at += WARPS * LANES) {
        const int plane = word * LANES + at / DEPTH, c = low + at % DEPTH;
        normals[at % DEPTH * (LANES + 1) + at / DEPTH] = plane < count && c < dim ? planes[(i64)plane * dim + c] : (T)0;
      }
      __syncthreads();
      for (int c = 0; c < DEPTH; c++) {
        const T normal = normals[c * (LANES + 1) + lane];
        for (int i = 0; i < EACH; i++) dot[i] += normal * rows[(warp * EACH + i) * DEPTH + c];
      }
      __syncthreads();
    }
    for (int i = 0; i < EACH; i++) {
      const u32 signs = __ballot_sync(ALL, dot[i] >= 0);
      if (lane == i) words[(warp * EACH + i) * packed + word] = signs;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < ROWS * tables; at += WARPS * LANES) {
    const int local = at % ROWS, table = at / ROWS;  // neighbouring threads write neighbouring codes
    const i64 row = first + local;
    if (row >= n) continue;
    const u32* signs = words + local * packed;
    u64 code = 0;
    for (int b = 0; b < bits; b++) {
      const int place = table * bits + b;
      code |= (u64)(signs[place / LANES] >> place % LANES & 1) << b;
    }
    codes[(row / run * tables + table) * run + row % run] = (i64)code;
  }
}
