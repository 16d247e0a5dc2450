#include "delta/delta.h"

#include <math.h>

#include "core/activations.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr float unit_eps = 1e-6f;

inline float rounded(const float*, float x) { return x; }
inline float rounded(const bf16*, float x) { return to_float(from_float<bf16>(x)); }
inline lanes rounded(const float*, lanes x) { return x; }
inline lanes rounded(const bf16*, lanes x) { return (lanes)(bf16_bits(x) << 16); }

inline float dot(const float* x, const float* y, int64_t n) {
  lanes total{};
  each_register(n, [&](int64_t c, int64_t count) { total += take(x + c, count) * take(y + c, count); });
  return sum(total);
}

inline void multiply(float* x, float factor, int64_t n) {
  each_register(n, [&](int64_t c, int64_t count) { put(x + c, take(x + c, count) * factor, count); });
}

// What a thread keeps of a token: the query and key of a key head, the values of all its value heads, and one head's output.
struct Token {
  float *q, *k, *v, *out;

  static int64_t bytes(const DeltaSizes& s) {
    return 2 * up_to(s.k_width * 4, 64) + up_to(s.v_heads / s.k_heads * s.v_width * 4, 64) + up_to(s.v_width * 4, 64);
  }
  Token(const DeltaSizes& s, char* memory) {
    Scratch scratch{memory};
    q = scratch.take<float>(s.k_width);
    k = scratch.take<float>(s.k_width);
    v = scratch.take<float>(s.v_heads / s.k_heads * s.v_width);
    out = scratch.take<float>(s.v_width);
  }
};

struct Step {  // of a head's state by a token
  float *state, decay, beta, reads;  // reads: k · q
};

// `count` registers of columns of a head's state: what key and query read of them, then their change.
template <int count>
inline void change_columns(const DeltaSizes& sizes, const Step& step, const Token& token, const float* v, int64_t c) {
  lanes by_key[count]{}, by_query[count]{};
  float* state = step.state + c;
  for (int64_t i = 0; i < sizes.k_width; ++i)
    for (int j = 0; j < count; ++j) {
      const lanes x = load(state + i * sizes.v_width + j * width);
      by_key[j] += token.k[i] * x;
      by_query[j] += token.q[i] * x;
    }
  for (int j = 0; j < count; ++j) {
    by_key[j] = step.beta * (load(v + c + j * width) - step.decay * by_key[j]);
    store(token.out + c + j * width, step.decay * by_query[j] + step.reads * by_key[j]);
  }
  for (int64_t i = 0; i < sizes.k_width; ++i)
    for (int j = 0; j < count; ++j) {
      float* x = state + i * sizes.v_width + j * width;
      store(x, step.decay * load(x) + token.k[i] * by_key[j]);
    }
}

// The same for less than a register of columns.
inline void change_some(const DeltaSizes& sizes, const Step& step, const Token& token, const float* v, int64_t c, int64_t n) {
  lanes by_key{}, by_query{};
  for (int64_t i = 0; i < sizes.k_width; ++i) {
    const lanes x = load_some(step.state + i * sizes.v_width + c, n);
    by_key += token.k[i] * x;
    by_query += token.q[i] * x;
  }
  by_key = step.beta * (load_some(v + c, n) - step.decay * by_key);
  store_some(token.out + c, step.decay * by_query + step.reads * by_key, n);
  for (int64_t i = 0; i < sizes.k_width; ++i) {
    float* x = step.state + i * sizes.v_width + c;
    store_some(x, step.decay * load_some(x, n) + token.k[i] * by_key, n);
  }
}

// The tokens of one page of a sequence at one key head, which owns its channels of the convolution and its value heads.
template <class T>
struct Piece {
  const DeltaSizes& sizes;
  const DeltaWeights& weights;
  const DeltaRows& given;
  const Rows& y;
  const Token& token;
  int64_t head, row, position, n;  // of the first token
  float* state;

  int64_t group() const { return sizes.v_heads / sizes.k_heads; }
  int64_t keys() const { return sizes.k_heads * sizes.k_width; }
  int64_t values() const { return sizes.v_heads * sizes.v_width; }
  int64_t conv_width() const { return 2 * keys() + values(); }
  float* matrix(int64_t v_head) const { return state + v_head * sizes.k_width * sizes.v_width; }
  float* input(int64_t place) const { return state + values() * sizes.k_width + place % (sizes.kernel - 1) * conv_width(); }

  const T* at(const DeltaPart& part, int64_t r) const { return row_of<const T>(part.rows, r) + head * part.apart; }

  // f(first channel, channels, the part, where it goes) for query, key and values of the head.
  template <class F>
  void each_part(const F& f) const {
    f(head * sizes.k_width, sizes.k_width, given.q, token.q);
    f(keys() + head * sizes.k_width, sizes.k_width, given.k, token.k);
    f(2 * keys() + head * group() * sizes.v_width, group() * sizes.v_width, given.v, token.v);
  }

  void begin(const float* before) const {  // null: no token comes before
    const auto copy = [&](float* to, int64_t count) {
      if (before == nullptr) std::memset(to, 0, count * sizeof(float));
      else std::memcpy(to, before + (to - state), count * sizeof(float));
    };
    copy(matrix(head * group()), group() * sizes.k_width * sizes.v_width);
    each_part([&](int64_t c, int64_t count, const DeltaPart&, float*) {
      for (int64_t place = 0; place < sizes.kernel - 1; ++place) copy(input(place) + c, count);
    });
  }

  void convolve(int64_t t) const {
    const int64_t place = position + t, seen = place < sizes.kernel ? place + 1 : sizes.kernel;
    each_part([&](int64_t first, int64_t count, const DeltaPart& part, float* to) {
      each_register(count, [&](int64_t i, int64_t some) {
        const int64_t c = first + i;
        lanes total = weights.conv_bias ? take(weights.conv_bias + c, some) : lanes{};
        for (int64_t j = seen - 1; j >= 0; --j) {
          const lanes x = j > t ? take(input(place - j) + c, some) : take(at(part, row + t - j) + i, some);
          total += take(weights.kernel + j * conv_width() + c, some) * x;
        }
        put(to + i, rounded(static_cast<const T*>(nullptr), Silu::at(total).value), some);
      });
    });
    multiply(token.q, 1.0f / sqrtf(dot(token.q, token.q, sizes.k_width) + unit_eps), sizes.k_width);
    multiply(token.q, 1.0f / sqrtf(static_cast<float>(sizes.k_width)), sizes.k_width);
    multiply(token.k, 1.0f / sqrtf(dot(token.k, token.k, sizes.k_width) + unit_eps), sizes.k_width);
  }

  Step step_of(int64_t g, int64_t r, float reads) const {  // of the g-th value head
    const T* type = nullptr;
    const int64_t v_head = head * group() + g;
    const float a = to_float(at(given.a, r)[g]) + weights.bias[v_head];
    const float soft = a > 20.0f ? a : log1pf(expf(a));
    const float weight = rounded(type, 1.0f / (1.0f + expf(-to_float(at(given.b, r)[g]))));
    return {matrix(v_head), expf(-weights.rate[v_head] * soft), rounded(type, weight * sizes.beta_scale), reads};
  }

  void scan(const Step& step, const float* v) const {
    constexpr int most = 8;
    int64_t c = 0;
    for (; c + most * width <= sizes.v_width; c += most * width) change_columns<most>(sizes, step, token, v, c);
    for (; c + width <= sizes.v_width; c += width) change_columns<1>(sizes, step, token, v, c);
    if (c < sizes.v_width) change_some(sizes, step, token, v, c, sizes.v_width - c);
  }

  void finish(int64_t g, int64_t r) const {
    const T* type = nullptr;
    const int64_t d = sizes.v_width;
    each_register(d, [&](int64_t c, int64_t n) { put(token.out + c, rounded(type, take(token.out + c, n)), n); });
    const float inverse = 1.0f / sqrtf(dot(token.out, token.out, d) / static_cast<float>(d) + sizes.eps);
    const T* z = at(given.z, r) + g * d;
    T* to = row_of<T>(y, r) + (head * group() + g) * d;
    each_register(d, [&](int64_t c, int64_t n) {
      const lanes normed = rounded(type, take(token.out + c, n) * inverse);
      put(to + c, rounded(type, take(weights.norm + c, n) * normed) * Silu::at(take(z + c, n)).value, n);
    });
  }

  void run() const {
    for (int64_t t = 0; t < n; ++t) {
      convolve(t);
      const float reads = dot(token.q, token.k, sizes.k_width);
      for (int64_t g = 0; g < group(); ++g) {
        scan(step_of(g, row + t, reads), token.v + g * sizes.v_width);
        finish(g, row + t);
      }
    }
    for (int64_t t = n < sizes.kernel ? 0 : n - sizes.kernel + 1; t < n && sizes.kernel > 1; ++t)
      each_part([&](int64_t first, int64_t count, const DeltaPart& part, float*) {
        const T* x = at(part, row + t);
        float* to = input(position + t) + first;
        each_register(count, [&](int64_t c, int64_t some) { put(to + c, take(x + c, some), some); });
      });
  }
};

template <class T>
void in_pages_typed(const DeltaSizes& sizes, const DeltaWeights& weights, const DeltaStates& states, const PagedBatch& batch,
                    const DeltaRows& given, const Rows& y, char* scratch) {
  const int64_t values = sizes.v_heads * sizes.v_width, own = Token::bytes(sizes);
  const int64_t numbers = values * sizes.k_width + (sizes.kernel - 1) * (2 * sizes.k_heads * sizes.k_width + values);
  const auto run = [&](const Token& token, int64_t s, int64_t head) {
    const int64_t* pages = batch.pages + batch.first_page[s];
    const auto state = [&](int64_t at) { return states.data + (pages[at / states.block] * states.layers + states.layer) * numbers; };
    int64_t position = batch.position[s];
    for (int64_t r = batch.first_row[s]; r < batch.first_row[s + 1];) {
      const int64_t in_page = states.block - position % states.block, left = batch.first_row[s + 1] - r;
      const Piece<T> piece{sizes, weights, given, y, token, head, r, position, in_page < left ? in_page : left, state(position)};
      if (position % states.block == 0) piece.begin(position == 0 ? nullptr : state(position - 1));
      piece.run();
      r += piece.n, position += piece.n;
    }
  };
  const int64_t tasks = batch.n_sequences * sizes.k_heads, most = max_threads();
  parallel_tasks(static_cast<int>(tasks < most ? tasks : most), [&](int thread, const auto& next) {
    const Token token(sizes, scratch + thread * own);
    for (int64_t task = next(); task < tasks; task = next()) run(token, task / sizes.k_heads, task % sizes.k_heads);
  });
}

int64_t scratch_bytes(const DeltaSizes& sizes) { return max_threads() * Token::bytes(sizes); }

void in_pages(const DeltaSizes& sizes, const DeltaWeights& weights, const DeltaStates& states, const PagedBatch& batch,
              const DeltaRows& given, const Rows& y, char* scratch) {
  sizes.dtype == Dtype::float32 ? in_pages_typed<float>(sizes, weights, states, batch, given, y, scratch)
                                : in_pages_typed<bf16>(sizes, weights, states, batch, given, y, scratch);
}

}  // namespace

const DeltaKernels delta = {scratch_bytes, in_pages};

}  // namespace VENEER_ISA
}  // namespace veneer
