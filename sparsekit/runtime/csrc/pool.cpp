// Who runs the work: a caller's runner, the process's OpenMP runtime, or a pool of parked threads.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

#include "internal.h"

namespace sk {
namespace {

// Threads that sleep between calls. One job at a time: a second caller runs its work alone rather than wait.
class Pool {
 public:
  void run(int threads, sk_body body, void* argument) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads <= 1 || !turn.owns_lock()) return body(argument, 0, 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(workers_.size()) < threads - 1) {
        int index = int(workers_.size()) + 1;
        try {
          workers_.emplace_back([this, index] { work(index); });
        } catch (...) {  // no more threads to be had: go on with those there are
          threads = index;
        }
      }
      body_ = body;
      argument_ = argument;
      count_ = threads;
      pending_ = threads - 1;
      ++generation_;
    }
    if (threads > 1) wake_.notify_all();
    body(argument, 0, threads);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= count_) continue;
      sk_body body = body_;
      void* argument = argument_;
      int count = count_;
      lock.unlock();
      body(argument, index, count);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  sk_body body_ = nullptr;
  void* argument_ = nullptr;
  uint64_t generation_ = 0;
  int count_ = 0, pending_ = 0;
};

Pool* pool() {
  static Pool* only = nullptr;
  static std::once_flag once;
  // Never destroyed: its threads outlive static destructors. A forked child has none of the threads, so it starts
  // with a new pool.
  std::call_once(once, [] {
    only = new Pool;
    pthread_atfork(nullptr, nullptr, [] { only = new Pool; });
  });
  return only;
}

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
} openmp;

struct Team {
  sk_body body;
  void* argument;
};

void openmp_entry(void* data) {
  Team* team = static_cast<Team*>(data);
  team->body(team->argument, openmp.thread_num(), openmp.num_threads());
}

void openmp_runner(void*, int threads, sk_body body, void* argument) {
  Team team{body, argument};
  openmp.parallel(openmp_entry, &team, unsigned(threads), 0);
}

sk_runner runner = nullptr;
void* runner_context = nullptr;

}  // namespace

void run(int threads, sk_body body, void* argument) {
  if (threads <= 1) return body(argument, 0, 1);
  if (runner) return runner(runner_context, threads, body, argument);
  pool()->run(threads, body, argument);
}

}  // namespace sk

extern "C" {
void sk_use_runner(sk_runner function, void* context) {
  sk::runner = function;
  sk::runner_context = context;
}
void sk_use_own_pool(void) { sk::runner = nullptr; }
void sk_use_openmp(void* gomp_parallel, void* thread_num, void* num_threads) {
  // A forked child has none of the runtime's threads and would wait for them for ever: it gets a pool of its own.
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      if (sk::runner == sk::openmp_runner) sk::runner = nullptr;
    });
  });
  memcpy(&sk::openmp.parallel, &gomp_parallel, sizeof(void*));
  memcpy(&sk::openmp.thread_num, &thread_num, sizeof(void*));
  memcpy(&sk::openmp.num_threads, &num_threads, sizeof(void*));
  sk_use_runner(sk::openmp_runner, nullptr);
}
}
