// Runs CUDA C++ kernels on the CPU, compiled by g++, to test their logic where there is no GPU:
//   g++ -std=c++17 -x c++ -DNUMGUARD_CUDA_SHIM -include cuda_shim.h -Wno-unknown-pragmas -ffp-contract=off runner.cpp
// Blocks run one after the other. Every thread of a block is a fiber that runs until it waits for others or ends, which
// drives threads as far apart as the kernel lets them: what a missing barrier should have ordered is then out of order.
// Whatever CUDA leaves undefined ends the process with a message. Not modelled: races between blocks, the memory model,
// spinning on what another thread writes, the rounding of fast intrinsics. One host thread only.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "cuda_shim.h switches stacks with x86-64 assembly for Linux: build this test there"
#endif

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_SHIM_ASAN 1
#endif
#endif
#ifdef CUDA_SHIM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

// ---- Keywords -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__  // empty, because libstdc++ writes __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "declare shared memory with NUMGUARD_SHARED, so that the shim can poison it");

// An array that all threads of a block see. Like __shared__ it belongs to the declaration: once per kernel, once per
// instantiation of a template. The tag's address stands for that.
#define NUMGUARD_SHARED(type, name, count) \
  static char name##_declaration;          \
  type(&name)[count] = ::cuda_shim::shared_array<type, (count)>(&name##_declaration)

// ---- Built-in types and variables -----------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as CUDA aligns them, so that the sanitizer finds the vector loads that a GPU would refuse.
#define CUDA_SHIM_VECTOR2(name, type, alignment) \
  struct alignas(alignment) name {               \
    type x, y;                                   \
  };                                             \
  inline name make_##name(type x, type y) { return {x, y}; }
#define CUDA_SHIM_VECTOR4(name, type, alignment) \
  struct alignas(alignment) name {               \
    type x, y, z, w;                             \
  };                                             \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_SHIM_VECTOR2(int2, int, 8)
CUDA_SHIM_VECTOR2(uint2, unsigned, 8)
CUDA_SHIM_VECTOR2(float2, float, 8)
CUDA_SHIM_VECTOR2(longlong2, long long, 16)
CUDA_SHIM_VECTOR2(ulonglong2, unsigned long long, 16)
CUDA_SHIM_VECTOR2(double2, double, 16)
CUDA_SHIM_VECTOR4(int4, int, 16)
CUDA_SHIM_VECTOR4(uint4, unsigned, 16)
CUDA_SHIM_VECTOR4(float4, float, 16)
CUDA_SHIM_VECTOR4(ulonglong4_16a, unsigned long long, 16)
CUDA_SHIM_VECTOR4(ulonglong4_32a, unsigned long long, 32)
#undef CUDA_SHIM_VECTOR2
#undef CUDA_SHIM_VECTOR4

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- The machine ----------------------------------------------------------------------------------------------------

// Saves the registers that a function must keep, stores the stack pointer and continues on the other stack. In
// assembly, because swapcontext makes a system call per switch, and because AddressSanitizer forgets the red zones of a
// stack that swapcontext or longjmp touches. Opaque to the compiler, so nothing stays in registers across the call.
extern "C" __attribute__((visibility("hidden"))) void cuda_shim_switch_stack(void** saved, void* next);
asm(R"(
  .section .text.cuda_shim_switch_stack,"axG",@progbits,cuda_shim_switch_stack,comdat
  .weak cuda_shim_switch_stack
  .hidden cuda_shim_switch_stack
  .type cuda_shim_switch_stack, @function
cuda_shim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_shim_switch_stack, .-cuda_shim_switch_stack
  .text
)");

namespace cuda_shim {

constexpr unsigned kLanes = 32;
constexpr unsigned kMostThreads = 1024;
constexpr int kPoison = 0xcb;
constexpr size_t kStackBytes = 256 << 10;  // only what is touched costs memory; sanitized frames are large

// Where the kernel calls: as a default argument it is evaluated at the call.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a thread waits in: this must agree among all that meet. A barrier of the block has no mask.
struct Call {
  const char* name;
  unsigned mask;
  Site site;

  bool operator==(const Call& other) const {
    return mask == other.mask && site.line == other.site.line && same(name, other.name) &&
           same(site.file, other.site.file);
  }

  std::string text() const {
    char mask_text[16] = "";
    if (mask != 0) snprintf(mask_text, sizeof mask_text, "(0x%08x)", mask);
    return std::string(name) + mask_text + " at " + site.file + ":" + std::to_string(site.line);
  }

 private:
  static bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
};

// What the lanes that met in a collective of their warp brought along.
struct Exchange {
  unsigned lanes;
  uint64_t values[kLanes];  // 0 for the lanes that were not there
};

struct Stack {
  void* pointer = nullptr;  // where it was left
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // AddressSanitizer's companion
};

struct Thread {
  enum State { kReady, kWaiting, kEnded };
  Stack stack;
  uint3 index;
  State state;
  Call call;  // the latest
  uint64_t value;
  Exchange received;
};

struct Free {
  void operator()(void* memory) const { free(memory); }
};

class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() {
    for (const Thread& thread : threads_) munmap(const_cast<void*>(thread.stack.bottom), thread.stack.bytes);
  }

  void set_order(const std::string& order) {
    const size_t colon = std::min(order.find(':'), order.size());
    order_ = order.substr(0, colon);
    random_.seed(colon < order.size() ? static_cast<unsigned>(atoi(order.c_str() + colon + 1)) : 1u);
    if (order_ != "forward" && order_ != "reverse" && order_ != "shuffled")
      die("unknown order '%s': choose forward, reverse, shuffled or shuffled:SEED", order.c_str());
  }

  void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (current_ != nullptr) die("a kernel launches a kernel: only the host can");
    if (threads == 0 || threads > kMostThreads)
      die("a block of %u x %u x %u threads: CUDA takes 1 to %u in all", block.x, block.y, block.z, kMostThreads);
    // 0 wraps around and is too many, too.
    if (grid.x - 1 > 0x7ffffffeu || grid.y - 1 > 0xfffeu || grid.z - 1 > 0xfffeu)
      die("a grid of %u x %u x %u blocks: CUDA takes 1 to 2147483647 x 65535 x 65535", grid.x, grid.y, grid.z);
    gridDim = grid;
    blockDim = block;
    kernel_ = &kernel;
    count_ = static_cast<unsigned>(threads);
    while (threads_.size() < threads) add_thread();
    std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
    arrange(blocks);
    for (const unsigned i : blocks) {
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      run_block();
    }
  }

  // Waits until every thread of the block is here and returns for how many of them the predicate holds. A thread that
  // has ended is missed like any other: CUDA wants the whole block at a barrier.
  unsigned meet_block(const char* name, bool predicate, Site site) {
    current_->call = {name, 0, site};
    if (ended_ > 0)
      die("divergent barrier: %s, but %u threads of the block have ended", current_->call.text().c_str(), ended_);
    if (arrived_ == 0) {
      barrier_ = current_->call;
      holds_ = 0;
    }
    if (!(barrier_ == current_->call))
      die("divergent barrier: %s, but %u threads wait in %s", current_->call.text().c_str(), arrived_,
          barrier_.text().c_str());
    holds_ += predicate;
    if (++arrived_ < count_) {
      wait();
    } else {
      arrived_ = 0;
      for (unsigned i = 0; i < count_; ++i) release(threads_[i]).value = holds_;
    }
    return static_cast<unsigned>(current_->value);
  }

  // Waits until every lane of the mask is here and returns what they brought. Lanes that a last, partial warp lacks
  // are not waited for.
  const Exchange& meet_warp(const char* name, unsigned mask, uint64_t value, Site site) {
    const unsigned me = lane();
    current_->call = {name, mask, site};
    current_->value = value;
    if (!(mask >> me & 1)) die("%s, but lane %u is not in its own mask", current_->call.text().c_str(), me);
    bool complete = true;
    for (unsigned i = 0; i < warp_lanes(); ++i) {
      if (i == me || !(mask >> i & 1)) continue;
      const Thread& other = neighbour(i);
      if (other.state == Thread::kEnded)
        die("divergent warp: %s, but lane %u has ended", current_->call.text().c_str(), i);
      if (other.state == Thread::kWaiting && other.call == current_->call) continue;
      // Groups of lanes may overlap in time, so another call is an error only if each waits for the other.
      if (other.state == Thread::kWaiting && other.call.mask >> me & 1)
        die("divergent warp: %s, but lane %u waits in %s", current_->call.text().c_str(), i, other.call.text().c_str());
      complete = false;
    }
    if (!complete) {
      wait();
      return current_->received;
    }
    Exchange all{};
    for (unsigned i = 0; i < warp_lanes(); ++i) {
      if (!(mask >> i & 1)) continue;
      all.lanes |= 1u << i;
      all.values[i] = neighbour(i).value;
    }
    for (unsigned i = 0; i < warp_lanes(); ++i)
      if (mask >> i & 1) release(neighbour(i)).received = all;
    return current_->received;
  }

  // The block's array for a declaration: from the heap, so that AddressSanitizer knows its bounds and its end.
  void* shared_array(const void* declaration, size_t bytes, size_t alignment) {
    for (const SharedArray& array : shared_)
      if (array.declaration == declaration) return array.memory.get();
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) die("out of memory");
    memset(memory, kPoison, bytes);
    shared_.push_back({declaration, std::unique_ptr<void, Free>(memory)});
    return memory;
  }

  unsigned lane() const { return linear_ % kLanes; }

  __attribute__((format(printf, 2, 3), noreturn)) void die(const char* format, ...) const {
    fprintf(stderr, "cuda_shim: ");
    if (current_ != nullptr)
      fprintf(stderr, "block (%u, %u, %u) thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
              threadIdx.y, threadIdx.z);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    abort();
  }

 private:
  struct SharedArray {
    const void* declaration;
    std::unique_ptr<void, Free> memory;
  };

  void arrange(std::vector<unsigned>& sequence) {
    std::iota(sequence.begin(), sequence.end(), 0u);
    if (order_ == "reverse") std::reverse(sequence.begin(), sequence.end());
    if (order_ == "shuffled") std::shuffle(sequence.begin(), sequence.end(), random_);
  }

  void run_block() {
    ended_ = 0;
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      threads_[i].state = Thread::kReady;
    }
    std::vector<unsigned> turns(count_);
    while (ended_ < count_) {
      bool stuck = true;
      arrange(turns);
      for (const unsigned i : turns) {
        if (threads_[i].state != Thread::kReady) continue;
        stuck = false;
        linear_ = i;
        current_ = &threads_[i];
        threadIdx = current_->index;
        switch_stack(scheduler_, current_->stack);
        current_ = nullptr;
      }
      if (stuck) report_deadlock();
    }
    shared_.clear();
  }

  void report_deadlock() const {
    std::vector<const Thread*> firsts;
    std::string waits;
    for (unsigned i = 0; i < count_; ++i) {
      const auto alike = [&](const Thread* first) { return first->call == threads_[i].call; };
      if (threads_[i].state == Thread::kEnded || std::any_of(firsts.begin(), firsts.end(), alike)) continue;
      firsts.push_back(&threads_[i]);
      waits += "\n  " + threads_[i].call.text() + " (thread " + std::to_string(i) + " and all that wait there)";
    }
    die("deadlock: in block (%u, %u, %u) threads wait for each other in%s", blockIdx.x, blockIdx.y, blockIdx.z,
        waits.c_str());
  }

  void wait() {
    Thread& self = *current_;
    self.state = Thread::kWaiting;
    switch_stack(self.stack, scheduler_);
  }

  static Thread& release(Thread& thread) {
    thread.state = Thread::kReady;
    return thread;
  }

  unsigned warp_lanes() const { return std::min(kLanes, count_ - (linear_ - lane())); }
  Thread& neighbour(unsigned lane_index) { return threads_[linear_ - lane() + lane_index]; }

  void end_thread() {
    if (arrived_ > 0)
      die("divergent barrier: this thread ends, but %u threads wait in %s", arrived_, barrier_.text().c_str());
    for (unsigned i = 0; i < warp_lanes(); ++i)
      if (neighbour(i).state == Thread::kWaiting && neighbour(i).call.mask >> lane() & 1)
        die("divergent warp: this thread ends, but lane %u waits in %s", i, neighbour(i).call.text().c_str());
    current_->state = Thread::kEnded;
    ++ended_;
    switch_stack(current_->stack, scheduler_);
  }

  // A fiber lives as long as the process and runs one thread of every block.
  static void run_fiber();

  void add_thread() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) die("no memory for a thread's stack");
    Stack& stack = threads_.emplace_back().stack;
    stack.bottom = memory;
    stack.bytes = kStackBytes;
    // What cuda_shim_switch_stack takes off: six registers, where to go on, and a return address that ends backtraces.
    void** const top = reinterpret_cast<void**>(static_cast<char*>(memory) + kStackBytes);
    top[-2] = reinterpret_cast<void*>(&run_fiber);
    stack.pointer = top - 8;
  }

  static void switch_stack(Stack& from, Stack& to) {
#ifdef CUDA_SHIM_ASAN
    __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
    cuda_shim_switch_stack(&from.pointer, to.pointer);
#ifdef CUDA_SHIM_ASAN
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
  }

  std::string order_ = "forward";
  std::mt19937 random_{1};
  std::deque<Thread> threads_;  // fibers keep pointers to them
  std::vector<SharedArray> shared_;
  Stack scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  unsigned count_ = 0;         // threads in a block
  Thread* current_ = nullptr;  // the one that runs, and its number in the block
  unsigned linear_ = 0;
  unsigned ended_ = 0;
  unsigned arrived_ = 0;  // how many wait at the block's barrier, which, and for how many the predicate holds
  Call barrier_{};
  unsigned holds_ = 0;
};

inline Machine machine;

inline void Machine::run_fiber() {
#ifdef CUDA_SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_.bottom, &machine.scheduler_.bytes);
#endif
  for (;;) {
    (*machine.kernel_)();
    machine.end_thread();
  }
}

// ---- For the runner -------------------------------------------------------------------------------------------------

// In which order threads take turns, and blocks: "forward", "reverse", "shuffled" (anew each turn) or "shuffled:SEED".
inline void set_order(const std::string& order) { machine.set_order(order); }

// Runs the kernel, a call of no arguments, for every thread of every block.
inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) { machine.launch(grid, block, kernel); }

template <class T, size_t kCount>
using Array = T[kCount];

template <class T, size_t kCount>
Array<T, kCount>& shared_array(const void* declaration) {
  static_assert(std::is_trivially_default_constructible<T>::value, "shared memory is not initialized on a GPU");
  return *static_cast<Array<T, kCount>*>(machine.shared_array(declaration, sizeof(Array<T, kCount>), alignof(T)));
}

// ---- What the intrinsics share --------------------------------------------------------------------------------------

template <class To, class From>
To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  const Exchange& all = machine.meet_warp(name, mask, word, site);
  if (!(all.lanes >> source & 1))
    machine.die("%s at %s:%d reads lane %u, which takes no part", name, site.file, site.line, source);
  memcpy(&value, &all.values[source], sizeof value);
  return value;
}

// The first lane of the group of `width` lanes that the caller is in.
inline unsigned first_of_group(int width) { return machine.lane() & ~(static_cast<unsigned>(width) - 1); }
inline unsigned last_of_group(int width) { return first_of_group(width) + static_cast<unsigned>(width) - 1; }

// The lanes for which the predicate holds, as bits.
inline unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  const Exchange& all = machine.meet_warp(name, mask, predicate, site);
  unsigned votes = 0;
  for (unsigned i = 0; i < kLanes; ++i) votes |= static_cast<unsigned>(all.values[i]) << i;
  return votes;
}

template <class T, class Combine>
T reduce(const char* name, unsigned mask, T value, Site site, Combine combine) {
  static_assert(std::is_same<T, unsigned>::value, "only unsigned, so that a signed maximum is not taken for it");
  const Exchange& all = machine.meet_warp(name, mask, value, site);
  for (unsigned i = 0; i < kLanes; ++i)
    if (i != machine.lane() && all.lanes >> i & 1) value = combine(value, static_cast<unsigned>(all.values[i]));
  return value;
}

// The type of a parameter that does not take part in deduction: atomicAdd(&count, 1) adds to whatever count is.
template <class T>
struct Same {
  using type = T;
};

// Threads take turns, so plain code is atomic. `unsigned long` is not in the list, because nvcc refuses it.
template <class T, class Combine>
T atomic(T* address, T value, Combine combine) {
  static_assert(
      std::is_same<T, int>::value || std::is_same<T, unsigned>::value || std::is_same<T, unsigned long long>::value,
      "the shim's atomics take int, unsigned and unsigned long long");
  const T old = *address;
  *address = combine(old, value);
  return old;
}

}  // namespace cuda_shim

// ---- Barriers and collectives ---------------------------------------------------------------------------------------

inline void __syncthreads(cuda_shim::Site site = cuda_shim::Site::here()) {
  cuda_shim::machine.meet_block("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, cuda_shim::Site site = cuda_shim::Site::here()) {
  return static_cast<int>(cuda_shim::machine.meet_block("__syncthreads_count", predicate != 0, site));
}
inline int __syncthreads_or(int predicate, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::machine.meet_block("__syncthreads_or", predicate != 0, site) > 0;
}
inline int __syncthreads_and(int predicate, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::machine.meet_block("__syncthreads_and", predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_shim::Site site = cuda_shim::Site::here()) {
  cuda_shim::machine.meet_warp("__syncwarp", mask, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_shim::Site site = cuda_shim::Site::here()) {
  const unsigned lane = cuda_shim::first_of_group(width) + (static_cast<unsigned>(source) & (width - 1u));
  return cuda_shim::shuffle("__shfl_sync", mask, value, lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_shim::Site site = cuda_shim::Site::here()) {
  const unsigned me = cuda_shim::machine.lane();
  const bool inside = me - cuda_shim::first_of_group(width) >= delta;
  return cuda_shim::shuffle("__shfl_up_sync", mask, value, inside ? me - delta : me, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_shim::Site site = cuda_shim::Site::here()) {
  const unsigned me = cuda_shim::machine.lane();
  const bool inside = cuda_shim::last_of_group(width) - me >= delta;
  return cuda_shim::shuffle("__shfl_down_sync", mask, value, inside ? me + delta : me, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flips, int width = warpSize,
                  cuda_shim::Site site = cuda_shim::Site::here()) {
  const unsigned me = cuda_shim::machine.lane(), lane = me ^ static_cast<unsigned>(flips);
  return cuda_shim::shuffle("__shfl_xor_sync", mask, value, lane <= cuda_shim::last_of_group(width) ? lane : me, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::vote("__all_sync", mask, predicate == 0, site) == 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::reduce("__reduce_add_sync", mask, value, site, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::reduce("__reduce_min_sync", mask, value, site, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, cuda_shim::Site site = cuda_shim::Site::here()) {
  return cuda_shim::reduce("__reduce_max_sync", mask, value, site, [](T a, T b) { return a < b ? b : a; });
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline void __threadfence() {}

// Sums wrap around, those of int too.
template <class T>
T atomicAdd(T* address, typename cuda_shim::Same<T>::type value) {
  return cuda_shim::atomic(address, value, [](T a, T b) {
    return static_cast<T>(static_cast<unsigned long long>(a) + static_cast<unsigned long long>(b));
  });
}
template <class T>
T atomicMin(T* address, typename cuda_shim::Same<T>::type value) {
  return cuda_shim::atomic(address, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T atomicMax(T* address, typename cuda_shim::Same<T>::type value) {
  return cuda_shim::atomic(address, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T atomicOr(T* address, typename cuda_shim::Same<T>::type value) {
  return cuda_shim::atomic(address, value, [](T a, T b) { return a | b; });
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

// As in CUDA: of an int and an unsigned the unsigned, and of a number and NaN the number.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
auto min(A a, B b) -> decltype(a + b) {
  using T = decltype(a + b);
  if constexpr (std::is_floating_point<T>::value) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
auto max(A a, B b) -> decltype(a + b) {
  using T = decltype(a + b);
  if constexpr (std::is_floating_point<T>::value) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline unsigned __float_as_uint(float value) { return cuda_shim::bit_copy<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return cuda_shim::bit_copy<float>(bits); }
inline long long __double_as_longlong(double value) { return cuda_shim::bit_copy<long long>(value); }
inline double __longlong_as_double(long long bits) { return cuda_shim::bit_copy<double>(bits); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int place = 0; place < 4; ++place)
    result |= static_cast<unsigned>(bytes >> (selectors >> (4 * place) & 7) * 8 & 0xff) << (8 * place);
  return result;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

struct __half_raw {
  unsigned short x;
};
struct __half {
  __half() = default;
  __half(__half_raw raw) : x(raw.x) {}
  unsigned short x;
};

// By the definition of the format, because not every g++ knows _Float16.
inline float __half2float(__half value) {
  const int exponent = value.x >> 10 & 31, mantissa = value.x & 0x3ff;
  const float sign = value.x & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return sign * (mantissa != 0 ? NAN : INFINITY);
  return sign * (exponent != 0 ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24));
}

// ---- The runtime, as far as a launcher calls it ---------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "invalid device";
}

namespace cuda_shim {

constexpr int kDevices = 8;
inline thread_local int current_device = 0;

// What a host launched, in order: so that tests can say where and how often.
struct LaunchRecord {
  int device;
  uintptr_t stream;
  unsigned blocks;
};
inline std::vector<LaunchRecord> launch_records;
inline std::mutex one_launch_at_a_time;

// A launch as a host makes it, from any thread: on the current device, in a stream. It is done when this returns.
template <class Body>
void launch_on(cudaStream_t stream, dim3 grid, dim3 block, Body&& body) {
  const std::lock_guard<std::mutex> alone(one_launch_at_a_time);
  launch_records.push_back({current_device, reinterpret_cast<uintptr_t>(stream), grid.x * grid.y * grid.z});
  launch(grid, block, body);
}

}  // namespace cuda_shim

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_shim::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_shim::kDevices) return cudaErrorInvalidDevice;
  cuda_shim::current_device = device;
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
