// Twin of opoch_xp/backends/cupy/ptx.cuh for a CPU: the same functions by the layouts that the PTX ISA documents.
// An asynchronous copy is queued, and done when it is waited for, no sooner.

#pragma once
#include "numbers.cuh"

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

inline float to_float(bf16 x) { return __int_as_float((int)x.bits << 16); }
inline float to_float(f16 x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof y);
  return (float)y;
}

template <class S> u32 packed(float low, float high);
template <> inline u32 packed<f16>(float low, float high) {
  const _Float16 both[2] = {(_Float16)low, (_Float16)high};
  u32 bits;
  std::memcpy(&bits, both, sizeof bits);
  return bits;
}
inline u32 rounded(float x) {
  u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
template <> inline u32 packed<bf16>(float low, float high) { return rounded(low) | rounded(high) << 16; }

template <class S> float half_of(u32 both, int upper) {
  const S one = {(unsigned short)(both >> 16 * upper)};
  return to_float(one);
}

template <class S> void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  auto& mine = emulate::self->fragment;
  for (int i = 0; i < 4; i++) mine[i] = a[i];
  for (int i = 0; i < 2; i++) mine[4 + i] = b[i];
  const int lane = emulate::self->index.x % emulate::WARP, base = emulate::self->index.x - lane;
  emulate::wait(emulate::warp());
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const auto& left = emulate::now->threads[base + row % 8 * 4 + k % 8 / 2].fragment;
      const auto& right = emulate::now->threads[base + column * 4 + k % 8 / 2].fragment;
      d[i] += half_of<S>(left[row / 8 + 2 * (k / 8)], k % 2) * half_of<S>(right[4 + k / 8], k % 2);
    }
  }
  emulate::wait(emulate::warp());
}

inline void copy_async(void* to, const void* from, bool there) {
  if ((size_t)to % 16 || (there && (size_t)from % 16)) {
    std::fprintf(stderr, "misaligned: an asynchronous copy of 16 bytes\n");
    std::abort();
  }
  emulate::self->copies.push_back({to, there ? from : nullptr, emulate::self->groups});
}
inline void copy_group() { emulate::self->groups++; }
template <int LEFT> void copy_wait() {
  auto& copies = emulate::self->copies;
  const int last = emulate::self->groups - LEFT;  // groups before this one are there
  for (const auto& copy : copies) {
    if (copy.group >= last) continue;
    if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  std::erase_if(copies, [&](const auto& copy) { return copy.group < last; });
}
