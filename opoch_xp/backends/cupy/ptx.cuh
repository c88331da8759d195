// The instructions that CUDA C++ has no name for without headers: 16-bit numbers, tensor cores, asynchronous copies.
// tests/cuda/ptx.cuh is the same for a CPU, by the layouts the PTX ISA documents. sm_80 and later, but for to_float.
//
// Source: PTX ISA 8.7, sections on mma.m16n8k16, cp.async and cvt.

#pragma once
#include "numbers.cuh"

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float((int)x.bits << 16); }
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Two numbers rounded to nearest, `low` in the lower half.
template <class S> __device__ u32 packed(float low, float high);
template <> __device__ __forceinline__ u32 packed<f16>(float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <> __device__ __forceinline__ u32 packed<bf16>(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// d (16 x 8) += a (16 x 16) b (16 x 8), by a warp. With y = lane / 4 and x = 2 (lane % 4), a lane holds, two neighbours a
// register: a: rows y, y + 8, y, y + 8 at columns x, x, x + 8, x + 8; b: rows x and x + 8 of column y; d: row y, then y + 8,
// at columns x and x + 1.
template <class S> __device__ void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> __device__ __forceinline__ void multiply_add<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> __device__ __forceinline__ void multiply_add<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from device to shared memory, both aligned, or zeros where there are none; there when their group is.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  const u32 address = (u32)__cvta_generic_to_shared(to);
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
// What was asked for since the last group is one.
__device__ __forceinline__ void copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all of this thread's groups but the last LEFT are there.
template <int LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#endif
