// Tasks over torch's threads: independent; no task waits for another (they need not run at once), and none may throw.
// Each thread takes a range of consecutive tasks in order, and when it is through helps the others: what tasks of one
// number touch stays in one thread's cache from call to call, and uneven tasks balance.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bertkern::cpu {

int thread_count();

void parallel_tasks(int64_t tasks, void (*run)(void* context, int64_t task), void* context);

// Where, in a later call with `other_tasks`, the thread will begin in whose range `task` of `tasks` lies.
int64_t first_task_of_same_worker(int64_t task, int64_t tasks, int64_t other_tasks);

template <class F>
void parallel(int64_t tasks, F&& f) {
  using Body = std::remove_reference_t<F>;
  parallel_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace bertkern::cpu
