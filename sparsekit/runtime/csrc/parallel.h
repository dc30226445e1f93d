// Work sharing on top of run(): items are handed out in runs from one counter, so a slow thread takes fewer.
#pragma once
#include <atomic>

#include "internal.h"

namespace sk {
namespace {

template <class F>
void for_each(int threads, int64_t count, int64_t grain, F& f) {  // f(begin, end, worker) must not throw
  struct Job {
    std::atomic<int64_t> next;
    int64_t count, grain;
    F* f;
  } job{{0}, count, grain < 1 ? 1 : grain, &f};
  int64_t runs = ceil_div(count, job.grain);
  if (runs < threads) threads = int(runs);
  if (threads <= 1) {
    if (count > 0) f(0, count, 0);
    return;
  }
  run(threads,
      [](void* argument, int worker, int) {
        Job& j = *static_cast<Job*>(argument);
        for (;;) {
          int64_t begin = j.next.fetch_add(j.grain, std::memory_order_relaxed);
          if (begin >= j.count) return;
          int64_t end = begin + j.grain < j.count ? begin + j.grain : j.count;
          (*j.f)(begin, end, worker);
        }
      },
      &job);
}

}  // namespace
}  // namespace sk
