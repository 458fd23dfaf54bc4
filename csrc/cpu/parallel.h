// Tasks over torch's threads: independent, taken one by one from a counter, so uneven tasks balance. No task waits for
// another (they need not run at once), and none may throw.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bertkern::cpu {

int thread_count();

void parallel_tasks(int64_t tasks, void (*run)(void* context, int64_t task), void* context);

template <class F>
void parallel(int64_t tasks, F&& f) {
  using Body = std::remove_reference_t<F>;
  parallel_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace bertkern::cpu
