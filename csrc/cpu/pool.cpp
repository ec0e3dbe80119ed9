#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace numguard::cpu {
namespace {

// About 20 microseconds: calls of one step follow each other faster than a sleeping thread wakes.
constexpr int kSpins = 1000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  Job(int tasks_, int workers, const std::function<void(int)>& work_) : tasks(tasks_), seats(workers), work(work_) {}

  void run() {
    for (;;) {
      const int task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      work(task);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
  bool done() const { return finished.load(std::memory_order_acquire) == tasks; }

  const int tasks;
  std::atomic<int> next{0};
  std::atomic<int> finished{0};
  std::atomic<int> seats;  // workers that may still join
  // Belongs to the caller. A worker that comes late finds no task left and does not touch it.
  const std::function<void(int)>& work;
};

class Pool {
 public:
  void run(int tasks, int threads, const std::function<void(int)>& work) {
    std::unique_lock<std::mutex> mine(callers_, std::try_to_lock);
    if (!mine.owns_lock()) {
      for (int task = 0; task < tasks; ++task) work(task);
      return;
    }
    while (workers_ < threads - 1) {
      std::thread(&Pool::serve, this).detach();
      ++workers_;
    }
    auto job = std::make_shared<Job>(tasks, threads - 1, work);
    {
      std::lock_guard<std::mutex> lock(jobs_);
      job_ = job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (threads == 2) {
      posted_.notify_one();
    } else {
      posted_.notify_all();
    }
    job->run();
    for (int spins = 0; !job->done(); ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        std::this_thread::yield();  // perhaps to the worker with the last task
      }
    }
  }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) relax();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(jobs_);
        posted_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job->seats.fetch_sub(1, std::memory_order_relaxed) > 0) job->run();
    }
  }

  std::mutex callers_;  // held by the one caller that uses the workers
  int workers_ = 0;     // guarded by callers_
  std::mutex jobs_;     // guards job_
  std::condition_variable posted_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> generation_{0};
};

// Never destroyed: its threads run until the process ends. A forked child has none of them, and perhaps locks that
// are never released, so it starts with a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
  (void)registered;
  Pool* current = the_pool.load();
  if (current == nullptr) {
    auto fresh = std::make_unique<Pool>();
    if (the_pool.compare_exchange_strong(current, fresh.get())) current = fresh.release();
  }
  return *current;
}

}  // namespace

void parallel_for(int tasks, int threads, const std::function<void(int)>& work) {
  if (threads > tasks) threads = tasks;
  if (threads > 1) {
    pool().run(tasks, threads, work);
  } else {
    for (int task = 0; task < tasks; ++task) work(task);
  }
}

}  // namespace numguard::cpu
