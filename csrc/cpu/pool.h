// A pool of worker threads that outlives calls, survives fork, and never makes a caller wait for a sleeping thread.
#pragma once

#include <functional>

namespace numguard::cpu {

// Calls work(task) once for every task in [0, tasks), on the calling thread and at most `threads - 1` workers, and
// returns when all are done. Tasks are handed out one by one, and finished tasks are counted, not workers: a worker
// that the system does not schedule takes no task and is not waited for. If another thread is using the pool, the
// caller does all the work itself.
void parallel_for(int tasks, int threads, const std::function<void(int)>& work);

}  // namespace numguard::cpu
