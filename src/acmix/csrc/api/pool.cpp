#include "api/pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define ACMIX_FORKS 1
#endif

namespace acmix {
namespace {

// One thread's scratch, kept between calls: pages fresh from the system cost more than small calls.
class Arena {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      block_.reset(new (std::nothrow) float[static_cast<size_t>(floats) + 16]);
      size_ = block_ ? floats : 0;
    }
    const auto address = reinterpret_cast<uintptr_t>(block_.get());
    return block_ ? reinterpret_cast<float*>((address + 63) / 64 * 64) : nullptr;
  }

 private:
  std::unique_ptr<float[]> block_;
  int64_t size_ = 0;
};

thread_local Arena arena;

struct Work {
  int64_t tasks, scratch;
  TaskFunction function;
  const void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void run() {
    float* memory = arena.get(scratch);
    if (!memory) {
      out_of_memory = true;
      return;
    }
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) function(context, task, memory);
  }
};

// Workers sleep on a condition variable; a caller hands out one piece of work at a time.
class Pool {
 public:
  // Only one caller at a time gets the workers; a second one works alone rather than wait.
  bool run(Work& work, int64_t helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      wanted_ = helpers < workers_ ? helpers : workers_;
    }
    wake_.notify_all();
    work.run();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
    return true;
  }

 private:
  void grow(int64_t helpers) {
    try {
      while (workers_ < helpers) {
        std::thread([this] { serve(); }).detach();
        workers_++;
      }
    } catch (const std::system_error&) {
      // no more threads to be had: those that there are do the work
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      wanted_--;
      busy_++;
      Work* work = work_;
      lock.unlock();
      work->run();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Work* work_ = nullptr;
  int64_t workers_ = 0, wanted_ = 0, busy_ = 0;
};

// Never destroyed: its threads may outlive the static objects.
std::atomic<Pool*> pool{nullptr};
std::atomic<ParallelRegion> lent{nullptr};

#if defined(ACMIX_FORKS)
// A forked child has none of its parent's threads, neither the pool's nor the runtime's.
void start_afresh() {
  pool = new Pool;
  lent = nullptr;
}
#endif

void prepare() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
#if defined(ACMIX_FORKS)
    pthread_atfork(nullptr, nullptr, start_afresh);
#endif
  });
}

void run_work(void* work) { static_cast<Work*>(work)->run(); }

}  // namespace

void lend_threads(ParallelRegion region) {
  prepare();
  lent = region;
}

bool run_tasks(int64_t threads, int64_t tasks, int64_t scratch, TaskFunction function,
               const void* context) {
  Work work;
  work.tasks = tasks;
  work.scratch = scratch;
  work.function = function;
  work.context = context;
  const int64_t team = threads < tasks ? threads : tasks;
  prepare();
  if (team < 2) {
    work.run();
  } else if (ParallelRegion region = lent) {
    region(run_work, &work, static_cast<unsigned>(team), 0);
  } else if (!pool.load()->run(work, team - 1)) {
    work.run();
  }
  return !work.out_of_memory || work.next >= tasks;
}

}  // namespace acmix
