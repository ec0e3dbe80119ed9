// Runs of elements in a file, read and scanned block by block while each block is in the cache.
#pragma once

#include <cstdint>

#include "stats.h"

namespace numguard::cpu {

// Adjacent elements in a file. Three words, as Python packs them.
struct FileRun {
  int64_t offset;  // of the first element, in bytes
  int64_t count;
  int64_t dtype;
};

constexpr int64_t kPage = 4096;

// Reads bytes [begin, end) of a file, `begin` at a page, and writes
//   out[i]: the record of those elements of run i that begin there; indices count from the run's first element
//   words[i]: a word for page i: its first eight bytes; 1 if they are zeros, and 0 if the whole page is
// A page that the file's end cuts off gets no word. Keeps one buffer of 256 KiB per thread.
// Returns 0, the number of an error, or -1 if the file ends before `end`.
int scan_file(int descriptor, int64_t begin, int64_t end, const FileRun* runs, int64_t count, Isa isa, Record* out,
              int64_t* words);

}  // namespace numguard::cpu
