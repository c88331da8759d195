// The tile that every attention kernel here is made of: BQ queries against BK rows that are named by pointers.
//
// What: logits = q . key for BQ x BK pairs, an online softmax, and out += weight * value. Which rows the keys and values
// are, and which pairs count, is the caller's: exact attention walks along the keys, the treecode through lists of cells
// and nodes, shared buckets through sorted keys. Nothing is gathered into memory: a row is read where it lies.
// Source: Dao, FlashAttention-2, 2023 (the loop); Milakov and Gimelshein, Online normalizer calculation, 2018.
//
// Threads: 128. In float32 and float64 they stand as 8 x 16 and multiply by themselves, four rows by four columns a thread.
// In 16 bits their four warps stand as 2 x 2 and multiply by tensor cores, 16 x 8 x 16 at a time, accumulating in float32;
// weights are rounded to 16 bits for the product with the values, not for their sum. Rows arrive by asynchronous copies,
// the next slab while this one is multiplied.
// Cost of a tile: BQ * BK * (d + e) multiply-adds; (d + e) * BK numbers of device memory; without tensor cores 8 words of
// shared memory per 16 multiply-adds.
//
// Letters: S, what keys and values are stored in; A, what is accumulated in; d = dim, numbers of a key; e = width, numbers
// of a value, of which a block does EP, from `column` on. With 16 bits d and e are multiples of 8 and rows aligned to 16
// bytes.

#pragma once
#include "numbers.cuh"
#include <ptx.cuh>

constexpr int BQ = 32;
constexpr int BK = 64;
constexpr int THREADS = 128;
constexpr int SLAB = 16;       // numbers of a key, or rows of values, in shared memory at a time
constexpr int PITCH = BK + 1;  // of rows of logits: neighbouring rows lie in different banks
constexpr int SLAB_16 = 32;    // numbers of a key in 16 bits at a time
constexpr int GAP = 8;         // 16-bit numbers between rows: rows of a fragment lie in different banks

template <class S> struct Accumulate {
  typedef float type;
};
template <> struct Accumulate<double> {
  typedef double type;
};

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

// Products by the threads themselves: S is A. `sum(r, c)` is the thread's part of the output, at row(r) and column(c).
template <class S, int EP> struct Products {
  typedef S A;
  static constexpr int ROWS = 4, COLUMNS = EP / 16;
  S* q;     // [d][BQ], scaled
  S* slab;  // [SLAB][max(PITCH, EP)]
  S out[ROWS][COLUMNS];

  __device__ char* begin(char* shared, int dim) {
    q = (S*)shared;
    slab = q + dim * BQ;
    return (char*)(slab + SLAB * (PITCH > EP ? PITCH : EP));
  }
  __device__ int row(int r) const { return threadIdx.x / 16 * 4 + r; }
  __device__ int column(int c) const { return threadIdx.x % 16 + 16 * c; }
  __device__ S& sum(int r, int c) { return out[r][c]; }
  __device__ S query(int i, int c, S) const { return q[c * BQ + i]; }
  __device__ void load(const S* queries, const i64* rows, int dim, S scale) { load_queries(q, queries, rows, dim, scale); }

  // Calls logit(query, column, q . key) for the thread's pairs.
  template <class Logit> __device__ void logits(const S* const* keys, int dim, S, Logit logit) {
    S dot[4][4];
    multiply(dot, q, keys, dim, slab, false);
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 4; i++) logit(row(r), column(i), dot[r][i]);
  }

  // out += weight * values, numbers [first, first + EP) of each.
  __device__ void add(const S* weight, const S* const* values, int first, int width) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    for (int low = 0; low < BK; low += SLAB) {
      for (int at = threadIdx.x; at < SLAB * EP; at += THREADS) {
        const int j = at / EP, c = first + at % EP;
        const S* value = values[low + j];
        slab[at] = value && c < width ? value[c] : (S)0;
      }
      __syncthreads();
      for (int j = 0; j < SLAB; j++) {
        S w[4];
        for (int r = 0; r < 4; r++) w[r] = weight[(4 * y + r) * PITCH + low + j];
        for (int i = 0; i < COLUMNS; i++) {
          const S value = slab[j * EP + x + 16 * i];
          for (int r = 0; r < 4; r++) out[r][i] += w[r] * value;
        }
      }
      __syncthreads();
    }
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Products by tensor cores: a warp holds 16 rows of the output and half of its columns, 8 at a time.
template <class S, int EP> struct TensorProducts {
  typedef float A;
  static constexpr int ROWS = 2, COLUMNS = EP / 8;
  static constexpr int KEY = SLAB_16 + GAP, VALUE = EP + GAP;                           // of rows in the slab
  static constexpr int HALF = BK * KEY > SLAB * VALUE ? BK * KEY : SLAB * VALUE;        // one of its two buffers
  S* q;     // [BQ][d up to a multiple of SLAB_16, + GAP], not scaled
  S* slab;  // [2][HALF]
  int pitch;
  float out[EP / 16][4];

  __device__ char* begin(char* shared, int dim) {
    pitch = (dim + SLAB_16 - 1) / SLAB_16 * SLAB_16 + GAP;
    slab = (S*)shared;
    q = slab + 2 * HALF;
    return (char*)(q + BQ * pitch);
  }
  __device__ int y() const { return threadIdx.x % LANES / 4; }
  __device__ int x() const { return threadIdx.x % 4 * 2; }
  __device__ int low_row() const { return threadIdx.x / LANES % 2 * 16; }
  __device__ int half() const { return threadIdx.x / LANES / 2; }
  __device__ int row(int r) const { return low_row() + y() + 8 * r; }
  __device__ int column(int c) const { return half() * (EP / 2) + c / 2 * 8 + x() + c % 2; }
  __device__ float& sum(int r, int c) { return out[c / 2][2 * r + c % 2]; }
  __device__ float query(int i, int c, float scale) const { return scale * to_float(q[i * pitch + c]); }
  __device__ void load(const S* queries, const i64* rows, int dim, float) {
    for (int at = threadIdx.x; at < BQ * pitch; at += THREADS) {
      const int i = at / pitch, c = at % pitch;
      q[at] = rows[i] < 0 || c >= dim ? S{0} : queries[rows[i] * dim + c];
    }
  }

  // The fragment of 16 numbers from c on of the warp's 16 rows.
  __device__ void left(u32 (&a)[4], int c) const {
    for (int i = 0; i < 4; i++) a[i] = *(const u32*)(q + (low_row() + y() + i % 2 * 8) * pitch + c + x() + i / 2 * 8);
  }

  __device__ void fetch_keys(const S* const* keys, int first, int dim) {
    S* to = slab + first / SLAB_16 % 2 * HALF;
    for (int at = threadIdx.x; at < BK * (SLAB_16 / 8); at += THREADS) {
      const int j = at / (SLAB_16 / 8), c = at % (SLAB_16 / 8) * 8;
      const bool there = keys[j] && first + c < dim;
      copy_async(to + j * KEY + c, there ? keys[j] + first + c : nullptr, there);
    }
    copy_group();
  }

  template <class Logit> __device__ void logits(const S* const* keys, int dim, float scale, Logit logit) {
    float dot[4][4] = {};  // four times 8 columns
    fetch_keys(keys, 0, dim);
    for (int first = 0; first < dim; first += SLAB_16) {
      if (first + SLAB_16 < dim) {
        fetch_keys(keys, first + SLAB_16, dim);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      const S* here = slab + first / SLAB_16 % 2 * HALF;
      for (int c = 0; c < SLAB_16; c += 16) {
        u32 a[4];
        left(a, first + c);
        for (int n = 0; n < 4; n++) {
          const S* key = here + (half() * (BK / 2) + 8 * n + y()) * KEY + c + x();
          const u32 b[2] = {*(const u32*)key, *(const u32*)(key + 8)};
          multiply_add<S>(dot[n], a, b);
        }
      }
      __syncthreads();  // before the buffer is filled again
    }
    for (int n = 0; n < 4; n++)
      for (int i = 0; i < 4; i++)
        logit(low_row() + y() + i / 2 * 8, half() * (BK / 2) + 8 * n + x() + i % 2, scale * dot[n][i]);
  }

  // SLAB values: copied as they are, or rounded from float32.
  __device__ void fetch_values(const S* const* values, int low, int first, int width) {
    S* to = slab + low / SLAB % 2 * HALF;
    for (int at = threadIdx.x; at < SLAB * (EP / 8); at += THREADS) {
      const int j = at / (EP / 8), c = at % (EP / 8) * 8;
      const bool there = values[low + j] && first + c < width;
      copy_async(to + j * VALUE + c, there ? values[low + j] + first + c : nullptr, there);
    }
    copy_group();
  }
  __device__ void fetch_values(const float* const* values, int low, int first, int width) {
    S* to = slab + low / SLAB % 2 * HALF;
    for (int at = threadIdx.x; at < SLAB * (EP / 2); at += THREADS) {
      const int j = at / (EP / 2), c = at % (EP / 2) * 2;
      const float* value = values[low + j];
      const bool there = value && first + c < width;
      *(u32*)(to + j * VALUE + c) = there ? packed<S>(value[first + c], value[first + c + 1]) : 0u;
    }
    copy_group();
  }

  template <class V> __device__ void add(const float* weight, const V* const* values, int first, int width) {
    fetch_values(values, 0, first, width);
    for (int low = 0; low < BK; low += SLAB) {
      if (low + SLAB < BK) {
        fetch_values(values, low + SLAB, first, width);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      const S* here = slab + low / SLAB % 2 * HALF;
      u32 a[4];
      for (int i = 0; i < 4; i++) {
        const float* w = weight + (low_row() + y() + i % 2 * 8) * PITCH + low + x() + i / 2 * 8;
        a[i] = packed<S>(w[0], w[1]);
      }
      for (int n = 0; n < EP / 16; n++) {
        const S* value = here + x() * VALUE + half() * (EP / 2) + 8 * n + y();
        const u32 b[2] = {value[0].bits | (u32)value[VALUE].bits << 16,
                          value[8 * VALUE].bits | (u32)value[9 * VALUE].bits << 16};
        multiply_add<S>(out[n], a, b);
      }
      __syncthreads();
    }
  }
};

template <int EP> struct Products<f16, EP> : TensorProducts<f16, EP> {};
template <int EP> struct Products<bf16, EP> : TensorProducts<bf16, EP> {};

#endif

// A block's tile. Shared memory: `tile_bytes` in launch.py counts the same arrays.
template <class S, int EP> struct Tile {
  typedef typename Accumulate<S>::type A;
  Products<S, EP> products;
  A* weight;              // [BQ][PITCH]: logits, then weights
  A *top, *total, *keep;  // [BQ]: the largest logit so far, the sum of weights, and what the last step left of both
  const S** keys;         // [BK]
  const void** values;    // [BK], at column 0: of S, or what `fold` is told
  i64* row;               // [BQ]: flat row of each query, -1 where there is none
  i64* limit;             // [BQ]: the caller's
  int dim, width, column;
  A scale;

  __device__ Tile(char* shared, int dim, int width, int column, A scale)
      : dim(dim), width(width), column(column), scale(scale) {
    row = (i64*)shared;
    limit = row + BQ;
    keys = (const S**)(limit + BQ);
    values = (const void**)(keys + BK);
    weight = (A*)products.begin((char*)(values + BK), dim);
    top = weight + BQ * PITCH;
    total = top + BQ;
    keep = total + BQ;
  }

  // Calls f(query, number of the value, sum) for the thread's part of the output.
  template <class F> __device__ void each(F f) {
    for (int r = 0; r < products.ROWS; r++)
      for (int c = 0; c < products.COLUMNS; c++) f(products.row(r), column + products.column(c), products.sum(r, c));
  }

  // Starts: `row` is set, by any threads. The state is empty. queries may be null where no logits are asked for.
  __device__ void begin(const S* queries) {
    __syncthreads();
    if (queries) products.load(queries, row, dim, scale);
    if (threadIdx.x < BQ) {
      top[threadIdx.x] = -infinity<A>();
      total[threadIdx.x] = 0;
    }
    each([](int, int, A& sum) { sum = 0; });
    __syncthreads();
  }

  // Starts from the state a launch before this one left in memory: sums of values, maxima, sums of weights. Every part of
  // a value has maxima and sums of weights of its own, since blocks do not wait for one another.
  __device__ void resume(const S* queries, const A* outs, const A* tops, const A* totals) {
    begin(queries);
    if (threadIdx.x < BQ && row[threadIdx.x] >= 0) {
      top[threadIdx.x] = tops[row[threadIdx.x]];
      total[threadIdx.x] = totals[row[threadIdx.x]];
    }
    each([&](int query, int c, A& sum) {
      if (row[query] >= 0 && c < width) sum = outs[row[query] * width + c];
    });
    __syncthreads();
  }

  // Logits of `keys` into `weight`, where counts(query, column) says so; -inf elsewhere.
  template <class Counts> __device__ void logits(Counts counts) {
    products.logits(keys, dim, scale, [&](int query, int c, A logit) {
      weight[query * PITCH + c] = keys[c] && counts(query, c) ? logit : -infinity<A>();
    });
  }

  // The online softmax: logits in `weight` become weights, the state is scaled to the new maximum.
  __device__ void rescale() {
    __syncthreads();
    const int query = threadIdx.x / 4, part = threadIdx.x % 4;
    A* mine = weight + query * PITCH;
    A high = top[query];
    for (int j = part; j < BK; j += 4) high = larger(high, mine[j]);
    high = max_over(high, 4);
    const A shift = high == -infinity<A>() ? (A)0 : high;
    A sum = 0;
    for (int j = part; j < BK; j += 4) {
      mine[j] = exponential(mine[j] - shift);
      sum += mine[j];
    }
    sum = sum_over(sum, 4);
    const A left = exponential(top[query] - shift);
    __syncwarp();
    if (part == 0) {
      keep[query] = left;
      total[query] = total[query] * left + sum;
      top[query] = high;
    }
    __syncthreads();
    each([&](int query, int, A& sum) { sum *= keep[query]; });
  }

  // One tile of logits, in `weight`, and of `values`, of type V, folded into the state.
  template <class V = S> __device__ void fold() {
    rescale();
    products.add(weight, (const V* const*)values, column, width);
  }

  // Writes sums and state: for a launch after this one.
  __device__ void suspend(A* outs, A* tops, A* totals) {
    __syncthreads();
    if (threadIdx.x < BQ && row[threadIdx.x] >= 0) {
      tops[row[threadIdx.x]] = top[threadIdx.x];
      totals[row[threadIdx.x]] = total[threadIdx.x];
    }
    write(outs, false);
  }

  // Writes out and lse; zeros and -inf for a query that saw nothing.
  __device__ void finish(A* outs, A* lse) {
    __syncthreads();
    if (threadIdx.x < BQ && row[threadIdx.x] >= 0 && column == 0) {
      const A sum = total[threadIdx.x];
      lse[row[threadIdx.x]] = sum != 0 ? top[threadIdx.x] + logarithm(sum) : -infinity<A>();
    }
    write(outs, true);
  }

  __device__ void write(A* outs, bool divided) {
    each([&](int query, int c, A& sum) {
      const A by = divided && total[query] != 0 ? total[query] : (A)1;
      if (row[query] >= 0 && c < width) outs[row[query] * width + c] = sum / by;
    });
  }
};
