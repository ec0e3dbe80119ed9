// The parts of CUDA beyond the language that the kernels use: shared memory, wide loads, and a few instructions.
//
// The tests compile the same sources with a C++ compiler and run every thread as a fiber (tests/cuda_shim, which
// defines NUMGUARD_CUDA_SHIM); where that has no such instruction, there is C++ code beside it.
#pragma once

#include <cstdint>

#ifndef NUMGUARD_CUDA_SHIM
#include <cuda_runtime.h>
#define NUMGUARD_SHARED(type, name, count) __shared__ type name[count]
#endif

// Loads of 32 bytes exist from Blackwell on. Results are the same with and without them.
#if !defined(NUMGUARD_WIDE_LOADS)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define NUMGUARD_WIDE_LOADS 1
#else
#define NUMGUARD_WIDE_LOADS 0
#endif
#endif

namespace numguard::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// 16 bytes that are read once: they need not stay in L1.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
#ifdef __CUDA_ARCH__
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(address));
  return words;
#else
  return *address;
#endif
}

// The 32 bytes at an address that 32 divides.
__device__ __forceinline__ void load_pair_once(const uint4* address, uint4& first, uint4& second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  asm volatile("ld.global.nc.L1::no_allocate.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
               : "=r"(first.x), "=r"(first.y), "=r"(first.z), "=r"(first.w), "=r"(second.x), "=r"(second.y),
                 "=r"(second.z), "=r"(second.w)
               : "l"(address));
#else
  first = load_once(address);
  second = load_once(address + 1);
#endif
}

// The larger of two numbers that are not negative, or NaN if one is NaN.
__device__ __forceinline__ float max_or_nan(float left, float right) {
#ifdef __CUDA_ARCH__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(left), "f"(right));
  return larger;
#else
  return __uint_as_float(max(__float_as_uint(left), __float_as_uint(right)));  // magnitudes order as their bits do
#endif
}

// The larger magnitudes of two halves each, as integers, which order alike, NaN last.
__device__ __forceinline__ uint32_t max_of_halves(uint32_t left, uint32_t right) {
  return max(left & 0x7fff0000u, right & 0x7fff0000u) | max(left & 0x7fffu, right & 0x7fffu);
}

// The larger magnitudes of two halves each, NaN if one is NaN.
__device__ __forceinline__ uint32_t max_magnitudes_float16(uint32_t left, uint32_t right) {
#ifdef __CUDA_ARCH__
  uint32_t larger;
  asm("{.reg .b32 m; abs.f16x2 m, %2; max.NaN.f16x2 %0, %1, m;}" : "=r"(larger) : "r"(left), "r"(right));
  return larger;
#else
  return max_of_halves(left, right);
#endif
}

__device__ __forceinline__ uint32_t max_magnitudes_bfloat16(uint32_t left, uint32_t right) {
#ifdef __CUDA_ARCH__
  uint32_t larger;
  asm("{.reg .b32 m; abs.bf16x2 m, %2; max.NaN.bf16x2 %0, %1, m;}" : "=r"(larger) : "r"(left), "r"(right));
  return larger;
#else
  return max_of_halves(left, right);
#endif
}

// The lower and the upper float16 of a word.
__device__ __forceinline__ void widen_float16_pair(uint32_t word, float& low, float& high) {
#ifdef __CUDA_ARCH__
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
#elif defined(NUMGUARD_CUDA_SHIM)
  low = __half2float(__half(__half_raw{static_cast<unsigned short>(word)}));
  high = __half2float(__half(__half_raw{static_cast<unsigned short>(word >> 16)}));
#else
  low = high = static_cast<float>(word);  // compiled by nvcc's pass for the host, never run
#endif
}

}  // namespace numguard::cuda
