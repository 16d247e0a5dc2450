#include "core/workspace.h"

#include <cstdlib>

namespace veneer {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* workspace(int64_t n) {
  static thread_local Buffer buffer;
  if (buffer.size < n) {
    std::free(buffer.data);
    const int64_t size = (n + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(size));
    buffer.size = buffer.data == nullptr ? 0 : size;
  }
  return buffer.data;
}

}  // namespace veneer
