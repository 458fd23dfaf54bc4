#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace bertkern::cpu {

namespace {

constexpr int kMaxWorkers = 256;

struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_tasks(int64_t tasks, void (*run)(void* context, int64_t task), void* context) {
  const int64_t workers = std::min<int64_t>({tasks, thread_count(), kMaxWorkers});
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task);
    return;
  }
  Range ranges[kMaxWorkers];
  for (int64_t w = 0; w < workers; ++w) {
    ranges[w].next.store(tasks * w / workers, std::memory_order_relaxed);
    ranges[w].end = tasks * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = 0; i < workers; ++i) {
      Range& range = ranges[(begin + i) % workers];
      for (int64_t task = range.next.fetch_add(1); task < range.end; task = range.next.fetch_add(1)) run(context, task);
    }
  });
}

int64_t first_task_of_same_worker(int64_t task, int64_t tasks, int64_t other_tasks) {
  const int64_t workers = std::min<int64_t>({tasks, thread_count(), kMaxWorkers});
  int64_t w = std::min(workers - 1, task * workers / std::max<int64_t>(tasks, 1));
  while (w + 1 < workers && tasks * (w + 1) / workers <= task) ++w;
  return other_tasks * w / std::max<int64_t>(workers, 1);
}

}  // namespace bertkern::cpu
