#include "core/parallel.h"

#include <dlfcn.h>

#ifdef VENEER_PLAIN_THREADS
#include <thread>
#include <vector>
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
  if (runtime.max_threads == nullptr || runtime.in_parallel()) return 1;
  return runtime.max_threads();
}

#ifdef VENEER_PLAIN_THREADS
void run_team(void (*body)(int, int, void*), void* data, int n_threads) {
  std::vector<std::thread> team;
  for (int i = 1; i < n_threads; ++i) team.emplace_back(body, i, n_threads, data);
  body(0, n_threads, data);
  for (std::thread& t : team) t.join();
}
#else
void run_team(void (*body)(int, int, void*), void* data, int n_threads) {
  Team team{body, data};
  runtime.parallel(
      [](void* p) {
        const Team& t = *static_cast<Team*>(p);
        t.body(runtime.thread_num(), runtime.num_threads(), t.data);
      },
      &team, static_cast<unsigned>(n_threads), 0);
}
#endif

}  // namespace veneer
