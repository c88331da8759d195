// The tile that every attention kernel here is made of: BQ queries against BK rows that are named by pointers.
//
// What: logits = q . key for BQ x BK pairs, an online softmax, and out += weight * value. Which rows the keys and values
// are, and which pairs count, is the caller's: exact attention walks along the keys, the treecode through lists of cells
// and nodes, shared buckets through sorted keys. Nothing is gathered into memory: a row is read where it lies.
// Source: Dao, FlashAttention-2, 2023 (the loop); Milakov and Gimelshein, Online normalizer calculation, 2018.
//
// Threads: 128 as 8 x 16. Thread (y, x) holds the rows 4 y .. 4 y + 3 and the columns x, x + 16, x + 32, ...: a warp reads
// neighbouring words of shared memory, or one word in all its lanes.
// Cost of a tile: BQ * BK * (d + e) multiply-adds; (d + e) * BK numbers of device memory; 8 words of shared memory per 16
// multiply-adds.
//
// Letters: d = dim, numbers of a key; e = width, numbers of a value, of which a block does EP, from `column` on.

#pragma once
#include "numbers.cuh"

constexpr int BQ = 32;
constexpr int BK = 64;
constexpr int THREADS = 128;
constexpr int SLAB = 16;         // numbers of a key, or rows of values, in shared memory at a time
constexpr int PITCH = BK + 1;    // of rows of logits: neighbouring rows lie in different banks

// dot[r][i] = q . row, for the thread's four rows and four columns; `rows` holds BK pointers, null where there is no row.
// `square`: q is squared. Every thread of the block calls it; the slab is free when it returns.
template <class T>
__device__ void multiply(T (&dot)[4][4], const T* q, const T* const* rows, int dim, T* slab, bool square) {
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  for (int r = 0; r < 4; r++)
    for (int i = 0; i < 4; i++) dot[r][i] = 0;
  for (int first = 0; first < dim; first += SLAB) {
    for (int at = threadIdx.x; at < BK * SLAB; at += THREADS) {
      const int j = at / SLAB, c = at % SLAB;
      slab[c * PITCH + j] = rows[j] && first + c < dim ? rows[j][first + c] : (T)0;
    }
    __syncthreads();
    const int count = smaller(SLAB, dim - first);
    for (int c = 0; c < count; c++) {
      T a[4], b[4];
      for (int r = 0; r < 4; r++) {
        a[r] = q[(first + c) * BQ + 4 * y + r];
        if (square) a[r] *= a[r];
      }
      for (int i = 0; i < 4; i++) b[i] = slab[c * PITCH + x + 16 * i];
      for (int r = 0; r < 4; r++)
        for (int i = 0; i < 4; i++) dot[r][i] += a[r] * b[i];
    }
    __syncthreads();
  }
}

// q[c * BQ + i] = scale * (number c of the query in flat row row[i]); zeros where that is negative.
template <class T> __device__ void load_queries(T* q, const T* queries, const i64* row, int dim, T scale) {
  for (int at = threadIdx.x; at < BQ * dim; at += THREADS) {
    const int i = at / dim, c = at % dim;
    q[c * BQ + i] = row[i] < 0 ? (T)0 : scale * queries[row[i] * dim + c];
  }
}

// A block's tile. Shared memory: `tile_bytes` in launch.py counts the same arrays.
template <class T, int EP> struct Tile {
  T* q;              // [d][BQ]
  T* slab;           // [SLAB][max(PITCH, EP)]
  T* weight;         // [BQ][PITCH]: logits, then weights
  T *top, *total, *keep;  // [BQ]: the largest logit so far, the sum of weights, and what the last step left of both
  const T** keys;    // [BK]
  const T** values;  // [BK], at column 0
  i64* row;          // [BQ]: flat row of each query, -1 where there is none
  i64* limit;        // [BQ]: the caller's
  int dim, width, column, y, x;
  T out[4][EP / 16];

  __device__ Tile(char* shared, int dim, int width, int column)
      : dim(dim), width(width), column(column), y(threadIdx.x / 16), x(threadIdx.x % 16) {
    row = (i64*)shared;
    limit = row + BQ;
    keys = (const T**)(limit + BQ);
    values = keys + BK;
    q = (T*)(values + BK);
    slab = q + dim * BQ;
    weight = slab + SLAB * (PITCH > EP ? PITCH : EP);
    top = weight + BQ * PITCH;
    total = top + BQ;
    keep = total + BQ;
  }

  // Starts: `row` is set, by any threads. The state is empty.
  __device__ void begin(const T* queries, T scale) {
    __syncthreads();
    load_queries(q, queries, row, dim, scale);
    if (threadIdx.x < BQ) {
      top[threadIdx.x] = -infinity<T>();
      total[threadIdx.x] = 0;
    }
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < EP / 16; i++) out[r][i] = 0;
    __syncthreads();
  }

  // Starts from the state a launch before this one left in memory: out holds sums, total is not 1.
  __device__ void resume(const T* queries, T scale, const T* outs, const T* tops, const T* totals) {
    begin(queries, scale);
    if (threadIdx.x < BQ && row[threadIdx.x] >= 0) {
      top[threadIdx.x] = tops[row[threadIdx.x]];
      total[threadIdx.x] = totals[row[threadIdx.x]];
    }
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < EP / 16; i++) {
        const int c = column + x + 16 * i;
        if (row[4 * y + r] >= 0 && c < width) out[r][i] = outs[row[4 * y + r] * width + c];
      }
    __syncthreads();
  }

  // Logits of `keys` into `weight`, where counts(query, column) says so; -inf elsewhere.
  template <class Counts> __device__ void logits(Counts counts) {
    T dot[4][4];
    multiply(dot, q, keys, dim, slab, false);
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 4; i++) {
        const int query = 4 * y + r, c = x + 16 * i;
        weight[query * PITCH + c] = keys[c] && counts(query, c) ? dot[r][i] : -infinity<T>();
      }
  }

  // The online softmax: logits in `weight` become weights, the state is scaled to the new maximum.
  __device__ void rescale() {
    __syncthreads();
    const int query = threadIdx.x / 4, part = threadIdx.x % 4;
    T* mine = weight + query * PITCH;
    T high = top[query];
    for (int j = part; j < BK; j += 4) high = larger(high, mine[j]);
    high = max_over(high, 4);
    const T shift = high == -infinity<T>() ? (T)0 : high;
    T sum = 0;
    for (int j = part; j < BK; j += 4) {
      mine[j] = exponential(mine[j] - shift);
      sum += mine[j];
    }
    sum = sum_over(sum, 4);
    const T left = exponential(top[query] - shift);
    __syncwarp();
    if (part == 0) {
      keep[query] = left;
      total[query] = total[query] * left + sum;
      top[query] = high;
    }
    __syncthreads();
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < EP / 16; i++) out[r][i] *= keep[4 * y + r];
  }

  // One tile of logits, in `weight`, and of `values`, folded into the state.
  __device__ void fold() {
    rescale();
    for (int first = 0; first < BK; first += SLAB) {
      for (int at = threadIdx.x; at < SLAB * EP; at += THREADS) {
        const int j = at / EP, c = column + at % EP;
        const T* value = values[first + j];
        slab[at] = value && c < width ? value[c] : (T)0;
      }
      __syncthreads();
      for (int j = 0; j < SLAB; j++) {
        T w[4];
        for (int r = 0; r < 4; r++) w[r] = weight[(4 * y + r) * PITCH + first + j];
        for (int i = 0; i < EP / 16; i++) {
          const T value = slab[j * EP + x + 16 * i];
          for (int r = 0; r < 4; r++) out[r][i] += w[r] * value;
        }
      }
      __syncthreads();
    }
  }

  // Writes sums and state: for a launch after this one.
  __device__ void suspend(T* outs, T* tops, T* totals) {
    __syncthreads();
    if (threadIdx.x < BQ && row[threadIdx.x] >= 0 && column == 0) {
      tops[row[threadIdx.x]] = top[threadIdx.x];
      totals[row[threadIdx.x]] = total[threadIdx.x];
    }
    write(outs, false);
  }

  // Writes out and lse; zeros and -inf for a query that saw nothing.
  __device__ void finish(T* outs, T* lse) {
    __syncthreads();
    if (threadIdx.x < BQ && row[threadIdx.x] >= 0 && column == 0) {
      const T sum = total[threadIdx.x];
      lse[row[threadIdx.x]] = sum != 0 ? top[threadIdx.x] + logarithm(sum) : -infinity<T>();
    }
    write(outs, true);
  }

  __device__ void write(T* outs, bool divided) {
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < EP / 16; i++) {
        const int query = 4 * y + r, c = column + x + 16 * i;
        const T sum = divided && total[query] != 0 ? total[query] : (T)1;
        if (row[query] >= 0 && c < width) outs[row[query] * width + c] = out[r][i] / sum;
      }
  }
};
