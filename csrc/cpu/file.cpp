#include "file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "float_state.h"

namespace numguard::cpu {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // read at once: fits the second-level cache
constexpr int64_t kMargin = 64;             // bytes after a block, for an element that begins in it and ends after it

int64_t divide_up(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

// Fills `buffer` with `wanted` bytes, or with fewer at the file's end; returns how many, or -1.
int64_t read_fully(int descriptor, uint8_t* buffer, int64_t wanted, int64_t offset) {
  int64_t done = 0;
  while (done < wanted) {
    const ssize_t got = pread(descriptor, buffer + done, static_cast<size_t>(wanted - done), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) break;
    done += got;
  }
  return done;
}

int64_t word_of_page(const uint8_t* page) {
  int64_t word;
  std::memcpy(&word, page, sizeof(word));
  if (word != 0) return word;
  return std::memcmp(page, page + sizeof(word), kPage - sizeof(word)) == 0 ? 0 : 1;
}

// The elements of a run that begin in `length` bytes at `begin`, and end in `held` bytes.
void scan_run(const FileRun& run, const uint8_t* data, int64_t begin, int64_t length, int64_t held, Isa isa,
              Record* out) {
  const Dtype dtype = static_cast<Dtype>(run.dtype);
  const int64_t size = kItemSize[dtype];
  const int64_t first = divide_up(begin - run.offset, size);
  const int64_t last = std::min({run.count, divide_up(begin + length - run.offset, size),
                                 std::max<int64_t>(0, (begin + held - run.offset) / size)});
  if (first >= last) return;
  Record part;
  scan_kernel(isa, dtype)(data + run.offset + first * size - begin, last - first, first, &part);
  append(*out, part);
}

}  // namespace

int scan_file(int descriptor, int64_t begin, int64_t end, const FileRun* runs, int64_t count, Isa isa, Record* out,
              int64_t* words) {
  const FloatState state;
  // Kept by each thread: memory of this size is mapped anew at every allocation, and its pages cost faults.
  static thread_local const std::unique_ptr<uint8_t[]> buffer(new uint8_t[kBlockBytes + kMargin]);
  std::fill(out, out + count, kEmptyRecord);
  for (int64_t at = begin; at < end; at += kBlockBytes) {
    const int64_t length = std::min(kBlockBytes, end - at);
    const int64_t held = read_fully(descriptor, buffer.get(), length + kMargin, at);
    if (held < 0) return errno;
    if (held < length) return -1;
    for (int64_t page = 0; page + kPage <= length; page += kPage) *words++ = word_of_page(buffer.get() + page);
    for (int64_t i = 0; i < count; ++i) scan_run(runs[i], buffer.get(), at, length, held, isa, &out[i]);
  }
  return 0;
}

}  // namespace numguard::cpu
