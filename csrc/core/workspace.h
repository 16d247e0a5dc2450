// Scratch memory that a thread keeps between calls: fresh pages would cost more than some of the kernels that need them.
#pragma once

#include <cstdint>

namespace veneer {

// At least n bytes, aligned to 64, valid until the calling thread's next call; null where memory has run out.
void* workspace(int64_t n);

}  // namespace veneer
