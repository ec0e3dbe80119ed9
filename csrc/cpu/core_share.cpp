#include "core_share.h"

#include <chrono>
#include <cstdint>

#include "stats.h"

namespace numguard::cpu {

#ifdef NUMGUARD_X86

namespace {

constexpr int64_t kRounds = 400;

double nanoseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
}

// 32 independent additions of vectors a round: as many at a time as there are ports.
double time_of_ports() {
  const auto begin = std::chrono::steady_clock::now();
  int64_t rounds = kRounds;
  asm volatile(
      "1:\n\t"
      ".rept 4\n\t"
      "vpaddd %%ymm8, %%ymm8, %%ymm0\n\tvpaddd %%ymm8, %%ymm8, %%ymm1\n\t"
      "vpaddd %%ymm8, %%ymm8, %%ymm2\n\tvpaddd %%ymm8, %%ymm8, %%ymm3\n\t"
      "vpaddd %%ymm8, %%ymm8, %%ymm4\n\tvpaddd %%ymm8, %%ymm8, %%ymm5\n\t"
      "vpaddd %%ymm8, %%ymm8, %%ymm6\n\tvpaddd %%ymm8, %%ymm8, %%ymm7\n\t"
      ".endr\n\t"
      "dec %0\n\tjnz 1b\n\tvzeroupper"
      : "+r"(rounds)
      :
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "cc");
  return nanoseconds_since(begin);
}

// 8 multiplications a round, each of the result of the one before: nobody's business but their own.
double time_of_latency() {
  const auto begin = std::chrono::steady_clock::now();
  int64_t rounds = kRounds, product = 3;
  asm volatile(
      "1:\n\t"
      ".rept 8\n\timul %1, %1\n\t.endr\n\t"
      "dec %0\n\tjnz 1b"
      : "+r"(rounds), "+r"(product)
      :
      : "cc");
  return nanoseconds_since(begin);
}

}  // namespace

double core_share() {
  if (!isa_supported(kIsaAvx2)) return 0;
  return time_of_ports() / time_of_latency();
}

#else

double core_share() { return 0; }

#endif

}  // namespace numguard::cpu
