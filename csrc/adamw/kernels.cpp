#include "adamw/adamw.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

constexpr int64_t block_size = 256;
constexpr int64_t grain_blocks = 64;

constexpr int32_t first_bin = 0x3400;                   // the upper half of 2^-23
constexpr int32_t n_bins = 0x3f80 - first_bin + 1;      // up to that of 1, which takes what rounding puts above it

// How a build reads codes: its own form of a table of 256 floats, and a block of codes through it.
#if defined(__AVX512VBMI__)
// One plane of 256 bytes for each byte of a float: sixteen permutations of bytes read 64 codes in a third of the time
// that gathers take.
struct Decoder {
  alignas(64) uint8_t planes[4][block_size];

  explicit Decoder(const float* table) {
    for (int64_t i = 0; i < 256; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(table[i]);
      for (int b = 0; b < 4; ++b) planes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
    }
  }

  static __m512i look_up(const uint8_t* plane, __m512i at, __mmask64 bit6, __mmask64 bit7) {
    __m512i found = _mm512_permutexvar_epi8(at, _mm512_load_si512(plane));
    found = _mm512_mask_permutexvar_epi8(found, bit6 & ~bit7, at, _mm512_load_si512(plane + 64));
    found = _mm512_mask_permutexvar_epi8(found, bit7 & ~bit6, at, _mm512_load_si512(plane + 128));
    return _mm512_mask_permutexvar_epi8(found, bit7 & bit6, at, _mm512_load_si512(plane + 192));
  }

  void run(const uint8_t* codes, int64_t n, float absmax, float* out) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t c = 0; c < n; c += 64) {
      const __mmask64 present = n - c >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - c)) - 1;
      const __m512i at = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(present, codes + c));
      const __mmask64 bit6 = _mm512_test_epi8_mask(at, _mm512_set1_epi8(64)), bit7 = _mm512_movepi8_mask(at);
      __m512i bytes[4];
      for (int b = 0; b < 4; ++b) bytes[b] = look_up(planes[b], at, bit6, bit7);
      const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
      const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
      store(out + c, (lanes)_mm512_unpacklo_epi16(low01, low23) * absmax);
      store(out + c + 16, (lanes)_mm512_unpackhi_epi16(low01, low23) * absmax);
      store(out + c + 32, (lanes)_mm512_unpacklo_epi16(high01, high23) * absmax);
      store(out + c + 48, (lanes)_mm512_unpackhi_epi16(high01, high23) * absmax);
    }
    for (int64_t i = n; i % width != 0; ++i) out[i] = 0.0f;
  }
};
#else
struct Decoder {
  const float* table;

  explicit Decoder(const float* t) : table(t) {}

  void run(const uint8_t* codes, int64_t n, float absmax, float* out) const {
    for (int64_t i = 0; i < n; ++i) out[i] = table[codes[i]] * absmax;
    for (int64_t i = n; i % width != 0; ++i) out[i] = 0.0f;
  }
};
#endif

// m / (sqrt(v) * scale + eps).
inline lanes direction(lanes m, lanes v, float scale, float eps) {
#if defined(__AVX512F__)
  // Estimates of 14 bits, each doubled once by Newton's rule: half the time of the CPU's own root and division.
  const lanes floor = splat(1.17549435e-38f), safe = v > floor ? v : floor;
  lanes inverse_root = (lanes)_mm512_rsqrt14_ps((__m512)safe);
  inverse_root *= 1.5f - 0.5f * safe * inverse_root * inverse_root;
  const lanes divisor = v * inverse_root * scale + eps;
  lanes inverse = (lanes)_mm512_rcp14_ps((__m512)divisor);
  inverse *= 2.0f - divisor * inverse;
  return m * inverse;
#else
  for (int64_t i = 0; i < width; ++i) v[i] = __builtin_sqrtf(v[i]);
  return m / (v * scale + eps);
#endif
}

// The code nearest to each value in [-1, 1], the lower one on a tie.
template <bool is_signed>
inline int_lanes encode(lanes x, const int32_t* bins) {
  const int_lanes bits = (int_lanes)x, magnitude = bits & 0x7fffffff;
  int_lanes bin = (magnitude >> 16) - first_bin;
  bin = bin < 0 ? int_lanes{} : bin;
  bin = bin > n_bins - 1 ? int_lanes{} + (n_bins - 1) : bin;
  const int_lanes negative = bits >> 31;
  if (is_signed) bin += negative & n_bins;
#if defined(__AVX512F__)
  const int_lanes found = (int_lanes)_mm512_i32gather_epi32((__m512i)bin, bins, 4);
#else
  int_lanes found;
  for (int64_t i = 0; i < width; ++i) found[i] = bins[bin[i]];
#endif
  const int_lanes beyond = (magnitude & 0xffff) > (found >> 8);  // -1 where true
  const int_lanes code = found & 0xff;
  return is_signed ? code - (beyond ^ negative) + negative : code - beyond;
}

inline void put_codes(uint8_t* codes, int_lanes code, int64_t n) {
#if defined(__AVX512F__)
  if (n == width) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8((__m512i)code));
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(code[i]);
}

inline bit_lanes larger_bits(bit_lanes a, bit_lanes b) { return a > b ? a : b; }
inline float largest_magnitude(bit_lanes m) {
  uint32_t most = 0;
  for (int64_t i = 0; i < width; ++i) most = m[i] > most ? m[i] : most;
  return bit_cast<float>(most);
}

// The moments of a block as they are before rounding, and as codes after it.
template <bool is_signed>
void quantize(const float* values, int64_t n, bit_lanes magnitudes, const AdamWMoment& moment, int64_t index) {
  const float most = largest_magnitude(magnitudes), factor = most > 0.0f ? 1.0f / most : 0.0f;
  moment.absmax[index] = most;
  uint8_t* codes = moment.codes + index * block_size;
  each_sixteen(n, [=, &moment](int64_t c, int64_t present) {
    const lanes value = load(values + c);
    int_lanes code = encode<is_signed>(value * factor, moment.bins);
    if (!is_signed) code = (value > 0.0f) & (code == 0) ? int_lanes{} + 1 : code;  // above zero it must not divide by eps
    put_codes(codes + c, code, present);
  });
}

inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

struct Decoders {
  Decoder first, second;
};

template <class P, class G>
bool step_block(const AdamWTensors& tensors, const AdamWStep& hyper, const Decoders& decoders, int64_t index) {
  const int64_t start = index * block_size, n = start + block_size <= tensors.n ? block_size : tensors.n - start;
  P* param = static_cast<P*>(tensors.param) + start;
  const G* grad = static_cast<const G*>(tensors.grad) + start;
  const AdamWMoment &first = tensors.first, &second = tensors.second;
  fetch(param + 2 * block_size, block_size * sizeof(P));
  fetch(grad + 2 * block_size, block_size * sizeof(G));
  fetch(first.codes + start + 2 * block_size, block_size);
  fetch(second.codes + start + 2 * block_size, block_size);
  alignas(64) float m_of[block_size], v_of[block_size];
  decoders.first.run(first.codes + start, n, first.absmax[index], m_of);
  decoders.second.run(second.codes + start, n, second.absmax[index], v_of);
  bit_lanes top_m{}, top_v{};
  each_sixteen(n, [&](int64_t c, int64_t present) {
    const lanes g = take(grad + c, present);
    const lanes m = load(m_of + c) * hyper.beta1 + g * hyper.rest1;
    const lanes v = load(v_of + c) * hyper.beta2 + (g * g) * hyper.rest2;
    const lanes move = hyper.rate * direction(m, v, hyper.root_scale, hyper.eps);
    put(param + c, take(param + c, present) * hyper.keep - move, present);
    store(m_of + c, m);
    store(v_of + c, v);
    top_m = larger_bits(top_m, (bit_lanes)m & 0x7fffffffu);
    top_v = larger_bits(top_v, (bit_lanes)v & 0x7fffffffu);
  });
  quantize<true>(m_of, n, top_m, first, index);
  quantize<false>(v_of, n, top_v, second, index);
  constexpr uint32_t infinity = 0x7f800000u;
  return bit_cast<uint32_t>(first.absmax[index]) < infinity && bit_cast<uint32_t>(second.absmax[index]) < infinity;
}

template <class P, class G>
bool step_typed(const AdamWTensors& tensors, const AdamWStep& hyper) {
  const Decoders decoders{Decoder(tensors.first.table), Decoder(tensors.second.table)};
  int finite = 1;
  parallel_for((tensors.n + block_size - 1) / block_size, grain_blocks, [&](int64_t begin, int64_t end) {
    bool mine = true;
    for (int64_t b = begin; b < end; ++b) mine = step_block<P, G>(tensors, hyper, decoders, b) && mine;
    if (!mine) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
  });
  return finite != 0;
}

template <class P>
bool step_param(const AdamWTensors& tensors, const AdamWStep& hyper) {
  switch (tensors.grad_dtype) {
    case Dtype::bfloat16: return step_typed<P, bf16>(tensors, hyper);
    case Dtype::float16: return step_typed<P, fp16>(tensors, hyper);
    default: return step_typed<P, float>(tensors, hyper);
  }
}

bool step(const AdamWTensors& tensors, const AdamWStep& hyper) {
  switch (tensors.param_dtype) {
    case Dtype::bfloat16: return step_param<bf16>(tensors, hyper);
    case Dtype::float16: return step_param<fp16>(tensors, hyper);
    default: return step_param<float>(tensors, hyper);
  }
}

}  // namespace

const AdamWKernels adamw = {step};

}  // namespace VENEER_ISA
}  // namespace veneer
