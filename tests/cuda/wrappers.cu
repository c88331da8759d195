// Every wrapper of ptx.cuh by itself, for test_wrappers.py: on a CPU by its twin, on a GPU by the instruction.

#include "ptx.cuh"

// bits[t] = a, b rounded and packed; wide (2, n) = the halves as float32. A thread a pair.
template <class S> __global__ void halves(const float* a, const float* b, u32* bits, float* wide, i64 n) {
  const i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
  if (i >= n) return;
  bits[i] = packed<S>(a[i], b[i]);
  const S low = {(unsigned short)(bits[i] & 0xffff)}, high = {(unsigned short)(bits[i] >> 16)};
  wide[i] = to_float(low);
  wide[n + i] = to_float(high);
}

// d (16, 8) += a (16, 16) b (16, 8), all float32 in memory; a warp.
template <class S> __global__ void product(const float* a, const float* b, float* d) {
  const int lane = threadIdx.x, y = lane / 4, x = lane % 4 * 2;
  u32 left[4], right[2];
  for (int i = 0; i < 4; i++) {
    const int row = y + i % 2 * 8, column = x + i / 2 * 8;
    left[i] = packed<S>(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (int i = 0; i < 2; i++) right[i] = packed<S>(b[(x + 8 * i) * 8 + y], b[(x + 8 * i + 1) * 8 + y]);
  float sums[4];
  for (int i = 0; i < 4; i++) sums[i] = d[(y + i / 2 * 8) * 8 + x + i % 2];
  multiply_add<S>(sums, left, right);
  for (int i = 0; i < 4; i++) d[(y + i / 2 * 8) * 8 + x + i % 2] = sums[i];
}

// out (2, 4 * threads) = x in two groups of copies of 16 bytes, of which those with `there` arrive and others are zeros; the
// first group is read when the second may still be under way.
template <class T> __global__ void copies(const T* x, const bool* there, T* out) {
  extern __shared__ __align__(16) char shared[];
  T* held = (T*)shared;
  const int n = 4 * blockDim.x, mine = 4 * threadIdx.x;
  for (int group = 0; group < 2; group++) {
    copy_async(held + group * n + mine, x + group * n + mine, there[group * blockDim.x + threadIdx.x]);
    copy_group();
  }
  copy_wait<1>();
  for (int i = 0; i < 4; i++) out[mine + i] = held[mine + i];
  copy_wait<0>();
  for (int i = 0; i < 4; i++) out[n + mine + i] = held[n + mine + i];
}
