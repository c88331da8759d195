// Numbers of either precision under one name, and how they are ordered.

#pragma once

typedef long long i64;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int LANES = 32;  // threads of a warp
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

template <class T> __device__ __forceinline__ T infinity() { return (T)__int_as_float(0x7f800000); }
template <class T> __device__ __forceinline__ T larger(T a, T b) { return a > b ? a : b; }
template <class T> __device__ __forceinline__ T smaller(T a, T b) { return a < b ? a : b; }

// Unsigned integers in the order of the numbers: both zeros are equal, NaN of either sign comes last.
__device__ __forceinline__ u64 ordered(double x) {
  if (x != x) return ~0ull;
  u64 bits = (u64)__double_as_longlong(x + 0.0);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ u64 ordered(float x) { return ordered((double)x); }

// Sum, maximum and minimum over `lanes` neighbouring lanes, a power of two; every lane gets it.
template <class T> __device__ __forceinline__ T sum_over(T x, int lanes) {
  for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}
template <class T> __device__ __forceinline__ T max_over(T x, int lanes) {
  for (int step = lanes / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(ALL, x, step));
  return x;
}
template <class T> __device__ __forceinline__ T min_over(T x, int lanes) {
  for (int step = lanes / 2; step; step /= 2) x = smaller(x, __shfl_xor_sync(ALL, x, step));
  return x;
}
