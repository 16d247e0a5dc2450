#include "core/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <climits>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace veneer {
namespace {

// The entry points that every OpenMP runtime torch ships with exports (libgomp; libomp and libiomp5 for compatibility).
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
};
Runtime runtime;  // written once by share_threads, before any kernel runs

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

struct Team {
  void (*body)(int, int, void*);
  void* data;
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that threads wait for: they spin, for a thread that sleeps is woken late, and then sleep, for one that spins
// takes the core from whoever has work.
class Gate {
 public:
  uint32_t read() const { return number_.load(std::memory_order_acquire); }
  void add() {
    number_.fetch_add(1);
    wake();
  }
  void clear() { number_.store(0, std::memory_order_relaxed); }

  // f(number) says that the wait is over.
  template <class F>
  void wait(const F& f) {
    constexpr int spins = 2000;
    for (int i = 0; i < spins; ++i) {
      if (f(read())) return;
      pause();
    }
    for (uint32_t seen = read(); !f(seen); seen = read()) sleep(seen);
  }

 private:
#if defined(__linux__)
  void sleep(uint32_t seen) {
    sleepers_.fetch_add(1);
    syscall(SYS_futex, &number_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
  }
  void wake() {
    if (sleepers_.load() > 0) syscall(SYS_futex, &number_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
#else
  void sleep(uint32_t) { std::this_thread::yield(); }
  void wake() {}
#endif

  alignas(64) std::atomic<uint32_t> number_{0};
  std::atomic<int> sleepers_{0};
};

// One team for many jobs, which its first thread posts one after the other.
struct StandingTeam {
  Gate posted, done;
  void (*body)(int, int, void*) = nullptr;  // null: no more jobs
  void* data = nullptr;
  int size = 1, n_threads = 0;

  void post() {
    done.clear();
    posted.add();
  }
  void serve(int index) {
    for (uint32_t jobs = 0;; ++jobs) {
      posted.wait([jobs](uint32_t now) { return now != jobs; });
      if (body == nullptr) return;
      if (index < n_threads) body(index, n_threads, data);
      done.add();
    }
  }
};
thread_local StandingTeam* standing = nullptr;

void run_standing(StandingTeam& team, void (*body)(int, int, void*), void* data, int n_threads) {
  team.body = body;
  team.data = data;
  team.n_threads = n_threads;
  team.post();
  standing = nullptr;  // within a team there is no other
  body(0, n_threads, data);
  standing = &team;
  const uint32_t others = static_cast<uint32_t>(team.size - 1);
  team.done.wait([others](uint32_t n) { return n == others; });
}

}  // namespace

std::string share_threads(const std::string& torch_library) {
  // NOLOAD: torch has loaded it already; loading a second copy here would be a second pool.
  void* library = dlopen(torch_library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return "";
  Runtime found;
  const bool complete = find(library, "GOMP_parallel", found.parallel) &&
                        find(library, "omp_get_max_threads", found.max_threads) &&
                        find(library, "omp_get_thread_num", found.thread_num) &&
                        find(library, "omp_get_num_threads", found.num_threads) &&
                        find(library, "omp_in_parallel", found.in_parallel);
  dlclose(library);
  if (!complete) return "";
  runtime = found;
  Dl_info info;
  const bool known = dladdr(reinterpret_cast<void*>(found.parallel), &info) != 0 && info.dli_fname != nullptr;
  return known ? info.dli_fname : "unknown";
}

int max_threads() {
  if (standing != nullptr) return standing->size;
  if (runtime.max_threads == nullptr || runtime.in_parallel()) return 1;
  return runtime.max_threads();
}

#ifdef VENEER_PLAIN_THREADS
void run_team(void (*body)(int, int, void*), void* data, int n_threads) {
  if (standing != nullptr) return run_standing(*standing, body, data, n_threads);
  std::vector<std::thread> team;
  for (int i = 1; i < n_threads; ++i) team.emplace_back(body, i, n_threads, data);
  body(0, n_threads, data);
  for (std::thread& t : team) t.join();
}
#else
void run_team(void (*body)(int, int, void*), void* data, int n_threads) {
  if (standing != nullptr) return run_standing(*standing, body, data, n_threads);
  Team team{body, data};
  runtime.parallel(
      [](void* p) {
        const Team& t = *static_cast<Team*>(p);
        t.body(runtime.thread_num(), runtime.num_threads(), t.data);
      },
      &team, static_cast<unsigned>(n_threads), 0);
}
#endif

void stand(void (*body)(void*), void* data) {
  const int threads = max_threads();
  if (threads <= 1 || standing != nullptr) return body(data);
  struct Job {
    StandingTeam team;
    void (*body)(void*);
    void* data;
  } job{{}, body, data};
  run_team(
      [](int index, int size, void* given) {
        Job& j = *static_cast<Job*>(given);
        if (index > 0) return j.team.serve(index);
        j.team.size = size;
        standing = &j.team;
        j.body(j.data);
        standing = nullptr;
        j.team.body = nullptr;
        j.team.post();
      },
      &job, threads);
}

}  // namespace veneer
