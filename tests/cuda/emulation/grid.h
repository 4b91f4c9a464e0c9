// A CUDA grid on one CPU thread.  Each CUDA thread is a fiber that runs until it waits at a barrier; barriers are those
// of a warp, a block and the grid.  Every thread must reach a barrier, or the run ends with an error: a barrier under a
// condition that differs between threads shows.  Fibers run in ascending or, with FASTGAN_EMULATION_REVERSED=1,
// descending order: a missing barrier shows in one of the two.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};

constexpr unsigned char kPoison = 0xff;  // a NaN in every floating type

struct FreeShared {
  void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t{16}); }
};

struct Block {
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<std::uint64_t> lanes;  // what shuffles exchange
  std::unique_ptr<unsigned char, FreeShared> shared;
};

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

// Where a fiber, or the scheduler, has stopped.  On x86-64 the switch is a few instructions: swapcontext sets the signal
// mask by a system call, and AddressSanitizer clears the shadow of the whole stack at each of its calls.
#if defined(__x86_64__)
struct Context {
  void** stack_pointer = nullptr;

  void begin(unsigned char* stack, std::size_t bytes, void (*function)()) {
    stack_pointer = reinterpret_cast<void**>(stack + bytes) - 8;  // six registers, the function, nothing to return to
    std::memset(stack_pointer, 0, 8 * sizeof(void*));
    stack_pointer[6] = reinterpret_cast<void*>(function);
  }
};

[[gnu::naked, gnu::noinline]] inline void switch_context(Context&, const Context&) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq (%rsi), %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n\t"
      "ret");
}
#else
struct Context {
  ucontext_t context;

  void begin(unsigned char* stack, std::size_t bytes, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
};

inline void switch_context(Context& from, const Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  uint3 thread, block;
  bool done = false;
  const Barrier* at = nullptr;  // waits while the barrier has this generation
  unsigned generation = 0;
  std::vector<Copy> open;                // asynchronous copies that are not committed
  std::deque<std::vector<Copy>> groups;  // committed; made only when waited for, as late as hardware may
};

inline bool reversed() {
  const char* order = std::getenv("FASTGAN_EMULATION_REVERSED");
  return order != nullptr && order[0] == '1';
}

class Grid {
 public:
  // All blocks of a grid, or `blocks` of its `all` from `first` on.
  Grid(unsigned blocks, unsigned threads, std::size_t shared_bytes, std::function<void()> kernel, unsigned first = 0,
       unsigned all = 0)
      : kernel_(std::move(kernel)), first_(first), blocks_(blocks), fibers_(std::size_t{blocks} * threads) {
    barrier.expected = blocks * threads;
    gridDim = {all == 0 ? blocks : all, 1, 1}, blockDim = {threads, 1, 1};
    for (Block& b : blocks_) {
      b.barrier.expected = threads;
      b.warps.resize(threads / 32);
      for (Barrier& w : b.warps) w.expected = 32;
      b.lanes.resize(threads);
      b.shared.reset(static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t{16})));
      std::memset(b.shared.get(), kPoison, shared_bytes);
    }
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      fibers_[i].block = {first + i / threads, 0, 0};
      fibers_[i].thread = {i % threads, 0, 0};
    }
  }

  void run() {
    const bool reversed = emulation::reversed();
    current = this;
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      if (i == stacks.size()) stacks.emplace_back(new unsigned char[kStack]);
      fibers_[i].stack = stacks[i].get();
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fibers_[i].stack, kStack);  // an earlier fiber's last frames
#endif
      fibers_[i].context.begin(fibers_[i].stack, kStack, &Grid::enter);
    }
    for (std::size_t left = fibers_.size(); left > 0;) {
      const unsigned before = progress_;
      for (std::size_t i = 0; i < fibers_.size(); ++i) {
        Fiber& f = fibers_[reversed ? fibers_.size() - 1 - i : i];
        if (f.done || (f.at != nullptr && f.at->generation == f.generation)) continue;
        resume(f);
        if (f.done) --left;
      }
      if (progress_ == before) fail("threads wait at barriers that the others never reach");
    }
    current = nullptr;
  }

  void wait(Barrier& at) {
    const unsigned generation = at.generation;
    if (++at.arrived == at.expected) {
      at.arrived = 0;
      ++at.generation;
      ++progress_;
    }
    if (at.generation != generation) return;
    running_->at = &at, running_->generation = generation;
    leave(false);
    running_->at = nullptr;
  }

  Block& block() { return blocks_[blockIdx.x - first_]; }
  Fiber& fiber() { return *running_; }

  Barrier barrier;
  static inline Grid* current = nullptr;

 private:
  static constexpr std::size_t kStack = 64 << 10;
  static inline std::vector<std::unique_ptr<unsigned char[]>> stacks;  // of all grids, which run one after another

  static void enter() {
    Grid& grid = *current;
    grid.entered();
    grid.kernel_();
    if (!grid.running_->groups.empty() && !grid.running_->groups.back().empty()) fail("copies never waited for");
    grid.running_->done = true;
    ++grid.progress_;
    grid.leave(true);
  }

  void resume(Fiber& f) {
    running_ = &f;
    threadIdx = f.thread, blockIdx = f.block;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack, kStack);
#endif
    switch_context(scheduler_, f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void leave([[maybe_unused]] bool for_good) {
    Fiber& f = *running_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_bottom_, scheduler_size_);
#endif
    switch_context(f.context, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom_, &scheduler_size_);
#endif
  }

  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_size_);
#endif
  }

  std::function<void()> kernel_;
  unsigned first_;
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  Fiber* running_ = nullptr;
  Context scheduler_;
  unsigned progress_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_bottom_ = nullptr;
  std::size_t scheduler_size_ = 0;
#endif
};

template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  Block& block = Grid::current->block();
  const unsigned warp = threadIdx.x / 32;
  std::memcpy(&block.lanes[threadIdx.x], &value, sizeof value);
  Grid::current->wait(block.warps[warp]);
  std::memcpy(&value, &block.lanes[warp * 32 + from % 32], sizeof value);
  Grid::current->wait(block.warps[warp]);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::Grid::current->wait(emulation::Grid::current->block().barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned lanes) {
  return emulation::exchange(value, (threadIdx.x % 32) ^ lanes);
}
#define FASTGAN_DYNAMIC_SHARED(name) unsigned char* const name = ::emulation::Grid::current->block().shared.get()
