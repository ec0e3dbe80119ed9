// Runs CUDA C++ kernels on the CPU, compiled by g++, to test their logic where there is no GPU:
//   g++ -std=c++17 -x c++ -DNUMGUARD_CUDA_SHIM -include cuda_shim.h -Wno-unknown-pragmas -ffp-contract=off runner.cpp
// Blocks run one after the other. Every thread of a block is a fiber that runs until it waits for others or ends, which
// drives threads as far apart as the kernel lets them: what a missing barrier should have ordered is then out of order.
// Whatever CUDA leaves undefined ends the process with a message. Not modelled: races between blocks, the memory model,
// spinning on what another thread writes, the rounding of fast intrinsics. One host thread only. It has what
// csrc/cuda takes of CUDA: blocks of whole warps in one dimension, one collective of a warp, one barrier of a block.
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
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "declare shared memory with NUMGUARD_SHARED, so that the shim can poison it");

// An array that all threads of a block see. Like __shared__ it belongs to the declaration: once per kernel, once per
// instantiation of a template. The tag's address stands for that.
#define NUMGUARD_SHARED(type, name, count) \
  static char name##_declaration;          \
  type(&name)[count] = ::cuda_shim::shared_array<type, (count)>(&name##_declaration)

// ---- Built-in types and variables -----------------------------------------------------------------------------------

struct dim3 {
  unsigned x;
  constexpr dim3(unsigned x = 1) : x(x) {}
};

// Aligned as CUDA aligns it, so that the sanitizer finds the vector loads that a GPU would refuse.
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx;

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
constexpr unsigned kMaxThreads = 1024;
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
    order_ = order;
    if (order_ != "forward" && order_ != "reverse" && order_ != "shuffled")
      die("unknown order '%s': choose forward, reverse or shuffled", order.c_str());
  }

  void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    if (current_ != nullptr) die("a kernel launches a kernel: only the host can");
    if (block.x - 1 >= kMaxThreads) die("a block of %u threads: CUDA takes 1 to %u", block.x, kMaxThreads);
    if (block.x % kLanes != 0) die("a block of %u threads: the shim takes whole warps", block.x);
    if (grid.x - 1 > 0x7ffffffeu) die("a grid of %u blocks: CUDA takes 1 to 2147483647", grid.x);  // 0 wraps around
    kernel_ = &kernel;
    count_ = block.x;
    while (threads_.size() < count_) add_thread();
    std::vector<unsigned> blocks(grid.x);
    arrange(blocks);
    for (const unsigned i : blocks) {
      blockIdx.x = i;
      run_block();
    }
  }

  // Waits until every thread of the block is here. A thread that has ended is missed like any other: CUDA wants the
  // whole block at a barrier.
  void meet_block(const char* name, Site site) {
    current_->call = {name, 0, site};
    if (ended_ > 0)
      die("divergent barrier: %s, but %u threads of the block have ended", current_->call.text().c_str(), ended_);
    if (arrived_ == 0) barrier_ = current_->call;
    if (!(barrier_ == current_->call))
      die("divergent barrier: %s, but %u threads wait in %s", current_->call.text().c_str(), arrived_,
          barrier_.text().c_str());
    if (++arrived_ < count_) {
      wait();
    } else {
      arrived_ = 0;
      for (unsigned i = 0; i < count_; ++i) release(threads_[i]);
    }
  }

  // Waits until every lane of the mask is here and returns what they brought.
  const Exchange& meet_warp(const char* name, unsigned mask, uint64_t value, Site site) {
    const unsigned me = lane();
    current_->call = {name, mask, site};
    current_->value = value;
    if (!(mask >> me & 1)) die("%s, but lane %u is not in its own mask", current_->call.text().c_str(), me);
    bool complete = true;
    for (unsigned i = 0; i < kLanes; ++i) {
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
    for (unsigned i = 0; i < kLanes; ++i) {
      if (!(mask >> i & 1)) continue;
      all.lanes |= 1u << i;
      all.values[i] = neighbour(i).value;
    }
    for (unsigned i = 0; i < kLanes; ++i)
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

  unsigned lane() const { return threadIdx.x % kLanes; }

  __attribute__((format(printf, 2, 3), noreturn)) void die(const char* format, ...) const {
    fprintf(stderr, "cuda_shim: ");
    if (current_ != nullptr) fprintf(stderr, "block %u thread %u: ", blockIdx.x, threadIdx.x);
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
    for (unsigned i = 0; i < count_; ++i) threads_[i].state = Thread::kReady;
    std::vector<unsigned> turns(count_);
    while (ended_ < count_) {
      bool stuck = true;
      arrange(turns);
      for (const unsigned i : turns) {
        if (threads_[i].state != Thread::kReady) continue;
        stuck = false;
        current_ = &threads_[i];
        threadIdx.x = i;
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
    die("deadlock: in block %u threads wait for each other in%s", blockIdx.x, waits.c_str());
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

  Thread& neighbour(unsigned lane_index) { return threads_[threadIdx.x - lane() + lane_index]; }

  void end_thread() {
    if (arrived_ > 0)
      die("divergent barrier: this thread ends, but %u threads wait in %s", arrived_, barrier_.text().c_str());
    for (unsigned i = 0; i < kLanes; ++i)
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
  Thread* current_ = nullptr;  // the one that runs
  unsigned ended_ = 0;
  unsigned arrived_ = 0;  // how many wait at the block's barrier, and which it is
  Call barrier_{};
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

// In which order threads take turns, and blocks: "forward", "reverse" or "shuffled" (anew each turn).
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

// ---- Bits -----------------------------------------------------------------------------------------------------------

template <class To, class From>
To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_shim

// ---- The barrier and the collective ---------------------------------------------------------------------------------

inline void __syncthreads(cuda_shim::Site site = cuda_shim::Site::here()) {
  cuda_shim::machine.meet_block("__syncthreads", site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flips, cuda_shim::Site site = cuda_shim::Site::here()) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  const unsigned source = cuda_shim::machine.lane() ^ static_cast<unsigned>(flips);
  const cuda_shim::Exchange& all = cuda_shim::machine.meet_warp("__shfl_xor_sync", mask, word, site);
  if (source >= cuda_shim::kLanes || !(all.lanes >> source & 1))
    cuda_shim::machine.die("__shfl_xor_sync at %s:%d reads lane %u, which takes no part", site.file, site.line, source);
  memcpy(&value, &all.values[source], sizeof value);
  return value;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

using std::max;  // of integers of one type
using std::min;

inline unsigned __float_as_uint(float value) { return cuda_shim::bit_copy<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return cuda_shim::bit_copy<float>(bits); }
inline long long __double_as_longlong(double value) { return cuda_shim::bit_copy<long long>(value); }
inline double __longlong_as_double(long long bits) { return cuda_shim::bit_copy<double>(bits); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int place = 0; place < 4; ++place)
    result |= static_cast<unsigned>(bytes >> (selectors >> (4 * place) & 7) * 8 & 0xff) << (8 * place);
  return result;
}

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
  launch_records.push_back({current_device, reinterpret_cast<uintptr_t>(stream), grid.x});
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
