// Runs the kernels of csrc/cuda on the calls in a file: `runner ORDER CALLS RECORDS`.
//
// CALLS has one after the other what `Call.packed` of tests/test_cuda_kernels.py makes of each. RECORDS gets the
// records of a call's segments as soon as it is done, so that their number tells which call ended the process.
#include "../../csrc/cuda/stats.cu"

#ifdef CUDA_SHIM_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#endif

namespace {

using namespace numguard;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "runner: %s\n", what);
  exit(1);
}

template <typename T>
std::vector<T> read_many(FILE* file, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));  // as large as needed: the sanitizer sees what lies behind
  if (fread(values.data(), sizeof(T), values.size(), file) != values.size()) fail("the file of calls is cut short");
  return values;
}

// A tensor's memory, at its address modulo kAlign. It ends with the allocation, and so at memory that the sanitizer
// does not let anybody read; what lies in front is forbidden too, down to the last 8 bytes.
class Memory {
 public:
  static constexpr size_t kAlign = 64;

  Memory(FILE* file, size_t offset, int64_t bytes) {
    const std::vector<char> contents = read_many<char>(file, bytes);
    if (contents.empty()) return;  // as torch has it: nothing, at address 0
    void* allocation = nullptr;
    if (posix_memalign(&allocation, kAlign, offset + contents.size()) != 0) fail("out of memory");
    allocation_.reset(allocation);
    char* const begin = static_cast<char*>(allocation) + offset;
    memcpy(begin, contents.data(), contents.size());
    ASAN_POISON_MEMORY_REGION(allocation, offset);
    address_ = reinterpret_cast<uint64_t>(begin);
  }

  uint64_t address() const { return address_; }

 private:
  std::unique_ptr<void, cuda_shim::Free> allocation_;
  uint64_t address_ = 0;
};

struct Header {
  int64_t detail, memories, segments, launches, chunks, splits, rows, results;
};

// What was in the records before the kernels wrote them is garbage, and no two calls find the same.
std::vector<Record> garbage(int64_t rows) {
  static unsigned char byte = 0;
  Record record;
  memset(&record, ++byte, sizeof record);
  return std::vector<Record>(static_cast<size_t>(rows), record);
}

void run_call(FILE* calls, FILE* results, const Header& header) {
  std::vector<Memory> memories;
  for (int64_t i = 0; i < header.memories; ++i) {
    const auto shape = read_many<int64_t>(calls, 2);
    memories.emplace_back(calls, static_cast<size_t>(shape[0]), shape[1]);
  }
  std::vector<uint64_t> addresses, starts;
  for (int64_t i = 0; i < header.segments; ++i) {
    const auto place = read_many<int64_t>(calls, 2);
    addresses.push_back(memories[static_cast<size_t>(place[0])].address() + static_cast<uint64_t>(place[1]));
  }
  // Those of one tensor count from its address, those of a list from 0, as in hallo_numguard/ops/cuda.py.
  const uint64_t base = memories.size() == 1 ? memories[0].address() : 0;
  for (const uint64_t address : addresses) starts.push_back(address - base);
  starts.shrink_to_fit();

  cuda::Tables tables{};
  for (int64_t i = 0; i < header.launches; ++i) {
    const auto launch = read_many<int64_t>(calls, 3);
    tables.launches.push_back({static_cast<Dtype>(launch[0]), launch[1], launch[2]});
  }
  const auto chunks = read_many<cuda::Chunk>(calls, header.chunks);
  const auto splits = read_many<cuda::Split>(calls, header.splits);
  tables.chunks = reinterpret_cast<uintptr_t>(chunks.data());
  tables.splits = reinterpret_cast<uintptr_t>(splits.data());
  tables.n_splits = header.splits;

  const auto address_of = [](std::vector<Record>& records) { return reinterpret_cast<uintptr_t>(records.data()); };
  std::vector<Record> records = garbage(header.rows);
  cuda::scan_table({0, 0}, tables, base, reinterpret_cast<uintptr_t>(starts.data()), header.detail,
                   address_of(records));
  if (header.segments <= cuda::inline_capacity()) {
    std::vector<Record> others = garbage(header.rows);
    cuda::scan_inline({0, 0}, tables, addresses.data(), header.segments, header.detail, address_of(others));
    if (memcmp(records.data(), others.data(), records.size() * sizeof(Record)) != 0)
      fail("addresses in a table and in the arguments give different records");
  }
  fwrite(records.data(), sizeof(Record), static_cast<size_t>(header.results), results);
  fflush(results);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) fail("usage: runner ORDER CALLS RECORDS");
  cuda_shim::set_order(arguments[1]);
  FILE* const calls = fopen(arguments[2], "rb");
  FILE* const results = fopen(arguments[3], "wb");
  if (calls == nullptr || results == nullptr) fail("cannot open the files");
  Header header;
  while (fread(&header, sizeof header, 1, calls) == 1) run_call(calls, results, header);
  fclose(calls);
  return fclose(results);
}
