// The work queue under many threads: every task runs once, and its writes are visible to
// the caller. Meant for -fsanitize=thread; see `make native-test`.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "runtime/scratch.h"
#include "runtime/work_queue.h"
#include "tests/fuzz/pool.h"

using raptax::fuzz::Pool;

namespace {

void run(Pool& pool, int64_t count, int64_t helpers) {
  std::vector<int64_t> done(static_cast<size_t>(count), 0);  // plain memory, on purpose
  raptax::WorkQueue::parallel_for(
      count, helpers,
      [](void* context, int64_t number) {
        raptax::Buffer scratch(1000 + 7000 * static_cast<size_t>(number % 3));
        int64_t* memory = scratch.as<int64_t>();
        for (int i = 0; i < 100; ++i) memory[i] = number;
        (*static_cast<std::vector<int64_t>*>(context))[static_cast<size_t>(number)] +=
            memory[99] + 1;
      },
      &done, [&](std::function<void()> job) { pool.schedule(std::move(job)); });
  for (int64_t n = 0; n < count; ++n) {
    if (done[static_cast<size_t>(n)] == n + 1) continue;
    std::fprintf(stderr, "task %lld of %lld ran %lld times\n", static_cast<long long>(n),
                 static_cast<long long>(count),
                 static_cast<long long>(done[static_cast<size_t>(n)] / (n + 1)));
    std::exit(1);
  }
}

}  // namespace

int main() {
  Pool pool(3);
  std::vector<std::thread> callers;  // several calls share the pool
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&pool] {
      for (int64_t round = 0; round < 2000; ++round) run(pool, round % 17, round % 5);
    });
  }
  for (std::thread& caller : callers) caller.join();
  Pool empty(0);
  run(empty, 50, 3);
  std::puts("parallel: every task ran once");
}
