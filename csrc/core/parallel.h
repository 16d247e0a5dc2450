// Teams of threads, borrowed from the OpenMP runtime that torch itself uses, so that a process has one pool of threads
// whatever that runtime is called. The module neither links OpenMP nor needs it to build.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

namespace veneer {

// Takes the team functions from the library at this path (torch's libtorch_cpu) and its dependencies. Returns the file of
// the OpenMP runtime found, or "" where there is none: then everything runs on the calling thread.
std::string share_threads(const std::string& torch_library);

int max_threads();    // torch.get_num_threads() of the calling thread; 1 inside a team
void run_team(void (*body)(int index, int size, void* data), void* data, int n_threads);

void stand(void (*body)(void* data), void* data);

// Calls f, whose teams are one and the same: between them its threads spin for some microseconds and then sleep, instead of
// going through the runtime each time. For many small pieces of work one after the other. What f throws is thrown on.
template <class F>
void with_standing_team(const F& f) {
  struct Job {
    const F* f;
    std::exception_ptr error;
  } job{&f, nullptr};
  stand(
      [](void* data) {
        Job& j = *static_cast<Job*>(data);
        try {
          (*j.f)();
        } catch (...) {
          j.error = std::current_exception();
        }
      },
      &job);
  if (job.error) std::rethrow_exception(job.error);
}

// Calls f(begin, end) on pieces of [0, n), one piece a thread, none shorter than grain but the last.
// f must not throw. What one index writes must not depend on the split.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t pieces = (n + grain - 1) / grain;
  const int64_t limit = pieces > 1 ? max_threads() : 1;
  const int threads = static_cast<int>(pieces < limit ? pieces : limit);
  if (threads <= 1) {
    f(int64_t{0}, n);
    return;
  }
  struct Job {
    const F* f;
    int64_t n;
  } job{&f, n};
  run_team(
      [](int index, int size, void* data) {
        const Job& j = *static_cast<Job*>(data);
        const int64_t begin = j.n * index / size, end = j.n * (index + 1) / size;
        if (begin < end) (*j.f)(begin, end);
      },
      &job, threads);
}

// The same, one index at a time worth a thread, and f(thread, begin, end) knows which of max_threads() threads it is on.
template <class F>
void parallel_for_indexed(int64_t n, const F& f) {
  if (n <= 0) return;
  const int64_t limit = max_threads();
  const int threads = static_cast<int>(n < limit ? n : limit);
  if (threads <= 1) {
    f(0, int64_t{0}, n);
    return;
  }
  struct Job {
    const F* f;
    int64_t n;
  } job{&f, n};
  run_team(
      [](int index, int size, void* data) {
        const Job& j = *static_cast<Job*>(data);
        const int64_t begin = j.n * index / size, end = j.n * (index + 1) / size;
        if (begin < end) (*j.f)(index, begin, end);
      },
      &job, threads);
}

// Calls f(thread, next) on n_threads threads: next() gives 0, 1, 2, … , each number to one thread, for work that is to be
// taken piece by piece because pieces differ in size. Who takes which must not change a result.
template <class F>
void parallel_tasks(int n_threads, const F& f) {
  int64_t taken = 0;
  const auto next = [&taken] { return __atomic_fetch_add(&taken, int64_t{1}, __ATOMIC_RELAXED); };
  parallel_for(n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) f(static_cast<int>(thread), next);
  });
}

}  // namespace veneer
