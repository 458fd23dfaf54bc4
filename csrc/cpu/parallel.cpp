#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace bertkern::cpu {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_tasks(int64_t tasks, void (*run)(void* context, int64_t task), void* context) {
  const int64_t workers = tasks < thread_count() ? tasks : thread_count();
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) run(context, task);
  });
}

}  // namespace bertkern::cpu
