// Rows of values in memory, as elementwise families take them.
// Functions are internal to each kernels.cpp and bindings.cpp, for the reason that numeric.h gives.
#pragma once

#include <cstdint>

namespace veneer {

struct Rows {  // of as many values as the call says, `stride` values apart
  void* data;
  int64_t stride;
};

namespace {

template <class T>
inline T* row_of(const Rows& rows, int64_t r) { return static_cast<T*>(rows.data) + r * rows.stride; }

inline Rows rows_at(uintptr_t data, int64_t stride) { return {reinterpret_cast<void*>(data), stride}; }

}  // namespace
}  // namespace veneer
