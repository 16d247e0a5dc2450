#include "scan/scan.h"

#include "core/parallel.h"
#include "scan/backward.h"
#include "scan/chunk.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

inline int64_t state_values(const ScanSizes& s) { return up_to(s.k_width, unit) * stride_of(s.v_width); }

// f(sequence's first row, the row after its last, head) for each sequence and head, on one of the threads.
template <class F>
void each_sequence(const ScanSizes& sizes, int64_t heads, int n_threads, const F& f) {
  const int64_t tasks = sizes.n_sequences * heads;
  parallel_tasks(static_cast<int>(tasks < n_threads ? tasks : n_threads), [&](int thread, const auto& next) {
    for (int64_t task = next(); task < tasks; task = next())
      f(thread, sizes.bounds[task / heads], sizes.bounds[task / heads + 1], task % heads);
  });
}

inline Place chunk_at(int64_t row, int64_t stop, int64_t head) { return {row, stop - row < longest ? stop - row : longest, head}; }

template <class T>
void forward_typed(const ScanSizes& sizes, const ScanRows& given, const ScanPart& y, char* memory, int64_t bytes, int n_threads) {
  each_sequence(sizes, sizes.heads, n_threads, [&](int thread, int64_t start, int64_t stop, int64_t head) {
    Scratch scratch{memory + thread * bytes};
    Chunk chunk(sizes, scratch);
    const Matrix state = matrix(scratch, sizes.k_width, sizes.v_width);
    std::memset(state.data, 0, state_values(sizes) * sizeof(float));
    for (int64_t row = start; row < stop; row += longest) {
      const Place place = chunk_at(row, stop, head);
      begin(chunk, sizes, given, place);
      find_errors<T>(chunk, sizes, given.v, place, state);
      find_outputs(chunk, state);
      write<T>(y, chunk.y, place, sizes.v_width);
      if (row + longest < stop) advance(chunk, state);
    }
  });
}

// The states before all chunks of a sequence are computed again, and its errors. Heads that share a key come one after the
// other, as their gradients are summed.
template <class T>
void backward_typed(const ScanSizes& sizes, const ScanRows& given, const ScanPart& dy, const ScanRows& gradients, char* memory,
                    int64_t bytes, int n_threads) {
  const int64_t values = state_values(sizes), errors = longest * stride_of(sizes.v_width);
  each_sequence(sizes, sizes.k_heads, n_threads, [&](int thread, int64_t start, int64_t stop, int64_t k_head) {
    Scratch scratch{memory + thread * bytes};
    Chunk chunk(sizes, scratch);
    Backward backward(sizes, scratch);
    const Matrix own_z = chunk.z;
    const int64_t chunks = (stop - start + longest - 1) / longest;
    const Matrix states = {scratch.take<float>(chunks * values), stride_of(sizes.v_width)};
    const Matrix z = {scratch.take<float>(chunks * errors), stride_of(sizes.v_width)};
    const auto state = [&](int64_t i) { return Matrix{states.data + i * values, states.stride}; };
    for (int64_t g = 0; g < sizes.group(); ++g) {
      const auto place = [&](int64_t i) { return chunk_at(start + i * longest, stop, k_head * sizes.group() + g); };
      std::memset(states.data, 0, (chunks > 0 ? values : 0) * sizeof(float));
      for (int64_t i = 0; i < chunks; ++i) {
        chunk.z.data = z.data + i * errors;
        begin(chunk, sizes, given, place(i));
        find_errors<T>(chunk, sizes, given.v, place(i), state(i));
        if (i + 1 == chunks) break;
        std::memcpy(state(i + 1).data, state(i).data, values * sizeof(float));
        advance(chunk, state(i + 1));
      }
      std::memset(backward.dstate.data, 0, values * sizeof(float));
      for (int64_t i = chunks - 1; i >= 0; --i) {
        chunk.z.data = z.data + i * errors;
        if (i + 1 < chunks) begin(chunk, sizes, given, place(i));
        read<T>(chunk.y, dy, place(i), sizes.v_width);
        backward.run(chunk, state(i));
        write<T>(gradients.v, backward.dz, place(i), sizes.v_width);
        write<float>(gradients.q, backward.dq, {place(i).row, place(i).count, k_head}, sizes.k_width, g > 0);
        write<float>(gradients.k, backward.dk, {place(i).row, place(i).count, k_head}, sizes.k_width, g > 0);
        for (int64_t r = 0; r < place(i).count; ++r) {
          *at<float>(gradients.log_decay, place(i).row + r, place(i).head) = backward.dlog_decay[r];
          *at<float>(gradients.beta, place(i).row + r, place(i).head) = backward.dbeta[r];
        }
      }
    }
    chunk.z = own_z;
  });
}

int64_t scratch_bytes(const ScanSizes& sizes, bool backward) {
  const int64_t state = state_values(sizes) * static_cast<int64_t>(sizeof(float));
  if (!backward) return Chunk::bytes(sizes) + state;
  const int64_t chunks = (sizes.longest() + longest - 1) / longest;
  return Chunk::bytes(sizes) + Backward::bytes(sizes) + chunks * (state + matrix_bytes(longest, sizes.v_width));
}

void forward(const ScanSizes& sizes, const ScanRows& given, const ScanPart& y, char* scratch, int n_threads) {
  const int64_t bytes = up_to(scratch_bytes(sizes, false), 64);
  sizes.dtype == Dtype::float32 ? forward_typed<float>(sizes, given, y, scratch, bytes, n_threads)
                                : forward_typed<bf16>(sizes, given, y, scratch, bytes, n_threads);
}

void backward(const ScanSizes& sizes, const ScanRows& given, const ScanPart& dy, const ScanRows& gradients, char* scratch,
              int n_threads) {
  const int64_t bytes = up_to(scratch_bytes(sizes, true), 64);
  sizes.dtype == Dtype::float32 ? backward_typed<float>(sizes, given, dy, gradients, scratch, bytes, n_threads)
                                : backward_typed<bf16>(sizes, given, dy, gradients, scratch, bytes, n_threads);
}

}  // namespace

const ScanKernels scan = {scratch_bytes, forward, backward};

}  // namespace VENEER_ISA
}  // namespace veneer
