// Pieces of a buffer that the caller gives. Internal to each kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include <cstdint>

namespace veneer {
namespace {

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Scratch {
  char* next;
  template <class T>
  T* take(int64_t n) {
    T* found = reinterpret_cast<T*>(next);
    next += up_to(n * static_cast<int64_t>(sizeof(T)), 64);
    return found;
  }
};

}  // namespace
}  // namespace veneer
