// CUDA on a CPU: enough of the language to run the kernels' own sources, one block at a time.
//
// A thread of a block is a fiber: it runs until it waits, and then the next does, in ascending or descending order. Without
// a barrier that a kernel needs, one of the two orders reads what is not yet written: shared memory is filled with NaN
// before every block. With EMULATE_THREADS a thread is a thread of the system, for ThreadSanitizer.
// A barrier that not all threads reach ends the program with a message.

#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};

char shared[232448] __attribute__((aligned(16)));  // what a block may have on the largest device

namespace emulate {

constexpr int WARP = 32;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned long generation = 0;
#ifdef EMULATE_THREADS
  std::mutex mutex;
  std::condition_variable changed;
#endif
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

struct Thread {
  dim3 index;
  Barrier* waiting = nullptr;
  unsigned long generation = 0;
  bool done = false;
  unsigned long long slot = 0;  // what it gives to the others of its warp, or block
  unsigned fragment[6] = {};    // of a matrix
  std::vector<Copy> copies;     // asked for, not yet done
  int groups = 0;
#ifndef EMULATE_THREADS
  bool started = false;
  ucontext_t context;  // where it starts
  jmp_buf resume;      // and goes on: swapcontext asks the system for its signals every time
  std::unique_ptr<char[]> stack;
#endif
};

struct Block {
  dim3 grid, block, index;
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
};

inline Block* now = nullptr;
#ifdef EMULATE_THREADS
inline thread_local Thread* self = nullptr;
#else
inline Thread* self = nullptr;
inline jmp_buf scheduler;
inline const std::function<void()>* body = nullptr;
#endif

#ifdef EMULATE_THREADS
inline void wait(Barrier& barrier) {
  std::unique_lock lock(barrier.mutex);
  const auto generation = barrier.generation;
  if (++barrier.arrived >= barrier.expected) {
    barrier.arrived = 0;
    barrier.generation++;
    barrier.changed.notify_all();
  } else {
    barrier.changed.wait(lock, [&] { return barrier.generation != generation; });
  }
}
inline void leave(Barrier& barrier) {
  std::unique_lock lock(barrier.mutex);
  barrier.expected--;
  if (barrier.expected && barrier.arrived >= barrier.expected) {
    barrier.arrived = 0;
    barrier.generation++;
    barrier.changed.notify_all();
  }
}
#else
inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.generation++;
}
inline void wait(Barrier& barrier) {
  if (++barrier.arrived >= barrier.expected) return release(barrier);
  self->waiting = &barrier;
  self->generation = barrier.generation;
  if (!_setjmp(self->resume)) _longjmp(scheduler, 1);
}
inline void leave(Barrier& barrier) {
  barrier.expected--;
  if (barrier.expected && barrier.arrived >= barrier.expected) release(barrier);
}
#endif

inline Barrier& warp() { return now->warps[self->index.x / WARP]; }

// What thread `from` gave, after all of its barrier gave theirs.
template <class Read> auto exchanged(Barrier& barrier, unsigned long long mine, Read read) {
  self->slot = mine;
  wait(barrier);
  const auto result = read();
  wait(barrier);
  return result;
}

template <class T> T shuffled(T x, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  unsigned long long mine = 0;
  std::memcpy(&mine, &x, sizeof(T));
  const unsigned base = self->index.x / WARP * WARP;
  const auto theirs = exchanged(warp(), mine, [&] { return now->threads[base + lane].slot; });
  std::memcpy(&x, &theirs, sizeof(T));
  return x;
}

#ifndef EMULATE_THREADS
inline void trampoline() {
  (*body)();
  self->done = true;
  leave(warp());
  leave(now->all);
  _longjmp(scheduler, 1);
}
#endif

inline void start(Block& block, const std::function<void()>& kernel, bool descending) {
  const int count = block.block.x;
  now = &block;
  std::memset(shared, 0xff, sizeof shared);
  block.all.expected = count;
  block.all.arrived = 0;
  for (size_t w = 0; w < block.warps.size(); w++) {
    block.warps[w].expected = std::min(WARP, count - (int)w * WARP);
    block.warps[w].arrived = 0;
  }
#ifdef EMULATE_THREADS
  (void)descending;
  std::vector<std::thread> running;
  for (int t = 0; t < count; t++)
    running.emplace_back([&, t] {
      self = &block.threads[t];
      self->index = {(unsigned)t, 0, 0};
      kernel();
      leave(warp());
      leave(now->all);
    });
  for (auto& thread : running) thread.join();
#else
  body = &kernel;
  for (int t = 0; t < count; t++) {
    Thread& thread = block.threads[t];
    thread.index = {(unsigned)t, 0, 0};
    thread.waiting = nullptr;
    thread.done = false;
    constexpr size_t STACK = 1 << 16;
    if (!thread.stack) thread.stack = std::make_unique<char[]>(STACK);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    thread.started = false;
    makecontext(&thread.context, trampoline, 0);
  }
  static volatile int left, at;  // of one block at a time; kept across jumps
  static volatile bool moved;
  for (left = count; left;) {
    moved = false;
    for (at = 0; at < count; at = at + 1) {
      Thread& thread = block.threads[descending ? count - 1 - at : at];
      if (thread.done || (thread.waiting && thread.waiting->generation == thread.generation)) continue;
      thread.waiting = nullptr;
      self = &thread;
      if (!_setjmp(scheduler)) {
        if (std::exchange(thread.started, true)) _longjmp(thread.resume, 1);
        setcontext(&thread.context);
      }
      moved = true;
      left = left - self->done;
    }
    if (!moved) {
      std::fprintf(stderr, "deadlock: some threads of a block wait at a barrier that others never reach\n");
      std::abort();
    }
  }
#endif
}

template <class... A, size_t... I>
void launch(void (*kernel)(A...), const unsigned* shape, void** arguments, std::index_sequence<I...>) {
  Block block;
  block.grid = {shape[0], shape[1], shape[2]};
  block.block = {shape[3], 1, 1};
  block.threads = std::vector<Thread>(shape[3]);
  block.warps = std::vector<Barrier>((shape[3] + WARP - 1) / WARP);
  const std::function<void()> body = [&] { kernel(*(A*)arguments[I]...); };
  for (unsigned z = 0; z < shape[2]; z++)
    for (unsigned y = 0; y < shape[1]; y++)
      for (unsigned x = shape[5]; x < shape[0]; x++) {
        block.index = {x, y, z};
        start(block, body, shape[4]);
      }
}

// shape: grid x, y, z, threads of a block, whether they run in descending order, and the first block in x to run.
template <class... A> void launch(void (*kernel)(A...), const unsigned* shape, void** arguments) {
  launch(kernel, shape, arguments, std::index_sequence_for<A...>{});
}

}  // namespace emulate

#define threadIdx (emulate::self->index)
#define blockIdx (emulate::now->index)
#define blockDim (emulate::now->block)
#define gridDim (emulate::now->grid)

inline void __syncthreads() { emulate::wait(emulate::now->all); }
inline void __syncwarp() { emulate::wait(emulate::warp()); }
inline int __syncthreads_or(int mine) {
  return emulate::exchanged(emulate::now->all, mine != 0, [] {
    for (const auto& thread : emulate::now->threads)
      if (thread.slot) return 1;
    return 0;
  });
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  return emulate::exchanged(emulate::warp(), mine, [] {
    unsigned votes = 0;
    const unsigned base = emulate::self->index.x / emulate::WARP * emulate::WARP;
    for (int lane = 0; lane < emulate::WARP && base + lane < emulate::now->threads.size(); lane++)
      votes |= (unsigned)(emulate::now->threads[base + lane].slot & 1) << lane;
    return votes;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T> T __shfl_xor_sync(unsigned, T x, int lanes) {
  return emulate::shuffled(x, (emulate::self->index.x % emulate::WARP) ^ lanes);
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
