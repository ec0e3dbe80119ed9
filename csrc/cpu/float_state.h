// The floating-point state that the kernels assume: round to nearest, subnormals kept. The caller's is restored.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace numguard::cpu {

class FloatState {
 public:
#if defined(__x86_64__)
  FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // power-on default: all masked, nothing flushed
  ~FloatState() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FloatState() : saved_(get()) { set(0); }
  ~FloatState() { set(saved_); }
#else
  FloatState() : saved_(0) {}
#endif
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
#if defined(__aarch64__)
  static uint64_t get() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
  uint64_t saved_;
#else
  unsigned int saved_;
#endif
};

}  // namespace numguard::cpu
