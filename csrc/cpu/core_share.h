// Whether a core is this thread's alone just now: for benchmarks.
#pragma once

namespace numguard::cpu {

// Time of a loop that the vector ports bound over that of one that only waits for itself. Up to twice the least that it
// is on this machine while another thread of the same core is busy, which a loop that only reads hardly notices. 0
// where it is not known: without AVX2.
double core_share();

}  // namespace numguard::cpu
