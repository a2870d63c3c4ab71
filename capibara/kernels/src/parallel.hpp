// Tasks 0 … count - 1 on a pool of threads and on the caller.
//
// Nobody waits for a helper to start: a handler of XLA runs on the pool itself, and all its threads may be such callers.
// Helpers and the caller take the next index until none is left; the caller then waits only for tasks in progress. A
// helper that starts later finds no index and touches nothing but the state, which it owns a share of.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace capibara {

// `pool` has num_threads(), the caller included, and Schedule(function). `function(index)` must not throw.
template <class Pool, class Function>
void parallel_for(Pool& pool, int64_t count, const Function& function) {
    struct State {
        std::atomic<int64_t> next{0}, done{0};
        std::mutex mutex;
        std::condition_variable finished;
    };
    const int64_t threads = pool.num_threads() < count ? pool.num_threads() : count;
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) function(i);
        return;
    }
    auto state = std::make_shared<State>();
    auto work = [state, count, f = &function] {
        for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
            (*f)(i);
            if (state->done.fetch_add(1) + 1 == count) {
                std::lock_guard<std::mutex> lock(state->mutex);
                state->finished.notify_all();
            }
        }
    };
    for (int64_t i = 1; i < threads; ++i) pool.Schedule(decltype(work)(work));
    work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->finished.wait(lock, [&] { return state->done.load() == count; });
}

// A pool for one call: threads that are started by Schedule and joined at the end. Nothing stays behind for a fork.
class Threads {
  public:
    Threads() = default;
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;
    ~Threads() {
        for (auto& thread : started_) thread.join();
    }
    void allow(int64_t count) { count_ = count; }
    int64_t num_threads() const { return count_; }
    template <class Function>
    void Schedule(Function&& function) {
        try {
            started_.emplace_back(std::forward<Function>(function));
        } catch (const std::system_error&) {  // the system gives no more threads: the others do the work
        }
    }

  private:
    int64_t count_ = 1;
    std::vector<std::thread> started_;
};

}  // namespace capibara
