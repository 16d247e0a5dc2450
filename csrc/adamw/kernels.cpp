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
// One plane of 256 bytes for each byte of a float: eight permutations of bytes read 64 codes in a fraction of the time
// that gathers take.
struct Decoder {
  alignas(64) uint8_t planes[4][block_size];

  explicit Decoder(const float* table) {
    for (int64_t i = 0; i < 256; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(table[i]);
      for (int b = 0; b < 4; ++b) planes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
    }
  }

  static __m512i look_up(const uint8_t* plane, __m512i at, __mmask64 upper) {
    const auto half = [=](const uint8_t* p) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(p), at, _mm512_load_si512(p + 64));
    };
    return _mm512_mask_mov_epi8(half(plane), upper, half(plane + 128));
  }

  void run(const uint8_t* codes, int64_t n, float absmax, float* out) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t c = 0; c < n; c += 64) {
      const __mmask64 present = n - c >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - c)) - 1;
      const __m512i at = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(present, codes + c));
      const __mmask64 upper = _mm512_movepi8_mask(at);
      __m512i bytes[4];
      for (int b = 0; b < 4; ++b) bytes[b] = look_up(planes[b], at, upper);
      const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
      const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
      store(out + c, (lanes)_mm512_unpacklo_epi16(low01, low23) * absmax);
      store(out + c + 16, (lanes)_mm512_unpackhi_epi16(low01, low23) * absmax);
      store(out + c + 32, (lanes)_mm512_unpacklo_epi16(high01, high23) * absmax);
      store(out + c + 48, (lanes)_mm512_unpackhi_epi16(high01, high23) * absmax);
    }
    for (int64_t i = n; i % 64 != 0; ++i) out[i] = 0.0f;
  }
};
#else
struct Decoder {
  const float* table;

  explicit Decoder(const float* t) : table(t) {}

  void run(const uint8_t* codes, int64_t n, float absmax, float* out) const {
    for (int64_t i = 0; i < n; ++i) out[i] = table[codes[i]] * absmax;
    for (int64_t i = n; i % 64 != 0; ++i) out[i] = 0.0f;
  }
};
#endif

// param = param * keep - rate * m / (sqrt(v) * scale + eps), for k registers that take each step together: one after
// another, the CPU's queues would fill with what waits for the step before.
template <int k>
inline void move(lanes (&param)[k], const lanes (&m)[k], const lanes (&v)[k], const AdamWStep& hyper) {
#if defined(__AVX512F__)
  // Estimates of 14 bits, each doubled once by Newton's rule: half the time of the CPU's own root and division.
  const __m512 half_scale = _mm512_set1_ps(0.5f * hyper.root_scale), eps = _mm512_set1_ps(hyper.eps);
  __m512 estimate[k], root[k], divisor[k];
  for (int i = 0; i < k; ++i)
    estimate[i] = _mm512_rsqrt14_ps(_mm512_max_ps((__m512)v[i], _mm512_set1_ps(1.17549435e-38f)));
  for (int i = 0; i < k; ++i) root[i] = _mm512_mul_ps((__m512)v[i], estimate[i]);
  for (int i = 0; i < k; ++i) estimate[i] = _mm512_fnmadd_ps(root[i], estimate[i], _mm512_set1_ps(3.0f));
  for (int i = 0; i < k; ++i) divisor[i] = _mm512_fmadd_ps(_mm512_mul_ps(root[i], half_scale), estimate[i], eps);
  for (int i = 0; i < k; ++i) estimate[i] = _mm512_rcp14_ps(divisor[i]);
  for (int i = 0; i < k; ++i) param[i] *= hyper.keep;
  for (int i = 0; i < k; ++i) root[i] = _mm512_mul_ps((__m512)(m[i] * hyper.rate), estimate[i]);
  for (int i = 0; i < k; ++i) estimate[i] = _mm512_fnmadd_ps(divisor[i], estimate[i], _mm512_set1_ps(2.0f));
  for (int i = 0; i < k; ++i) param[i] = (lanes)_mm512_fnmadd_ps(root[i], estimate[i], (__m512)param[i]);
#else
  for (int i = 0; i < k; ++i) {
    lanes root = v[i];
#if defined(__AVX2__)
    root = (lanes)_mm256_sqrt_ps((__m256)root);
#else
    for (int64_t j = 0; j < width; ++j) root[j] = __builtin_sqrtf(root[j]);
#endif
    param[i] = param[i] * hyper.keep - hyper.rate * (m[i] / (root * hyper.root_scale + hyper.eps));
  }
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
#elif defined(__AVX2__)
  const int_lanes found = (int_lanes)_mm256_i32gather_epi32(bins, (__m256i)bin, 4);
#else
  int_lanes found;
  for (int64_t i = 0; i < width; ++i) found[i] = bins[bin[i]];
#endif
  const int_lanes beyond = (magnitude & 0xffff) > (found >> 8);  // -1 where true
  const int_lanes code = found & 0xff;
  return is_signed ? code - (beyond ^ negative) + negative : code - beyond;
}

// Above zero the second moment keeps a code above that of zero: nothing must be divided by eps alone.
template <bool is_signed>
inline int_lanes encode_moment(lanes value, float factor, const int32_t* bins) {
  const int_lanes code = encode<is_signed>(value * factor, bins);
  return !is_signed ? ((value > 0.0f) & (code == 0) ? int_lanes{} + 1 : code) : code;
}

// n values -> codes; what follows up to the next multiple of 64 is read and ignored.
#if defined(__AVX512F__)
// Without a gather, which takes longer than all of this: by lines, and by bins where a line cannot tell.
template <bool is_signed>
struct Encoder {
  const int32_t* bins;
  __m512 edge, slope[2], offset[2], top[2];

  explicit Encoder(const AdamWMoment& m) : bins(m.bins), edge(_mm512_loadu_ps(m.lines->edge)) {
    for (int i = 0; i < 2; ++i) {
      slope[i] = _mm512_loadu_ps(m.lines->slope + 16 * i);
      offset[i] = _mm512_loadu_ps(m.lines->offset + 16 * i);
      top[i] = _mm512_loadu_ps(m.lines->top + 16 * i);
    }
  }

  // 512 + code + 2^-14 of 64 values, as its bits. Four registers take each step together: one after another, the CPU's
  // queues would fill with what waits for the step before.
  void places(const float* values, __m512 factor, __m512i (&at)[4]) const {
    const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000));
    const __m512i least = _mm512_set1_epi32(0x33800000);      // 2^-24, nearer to zero than to any code
    const __m512i above_zero = _mm512_set1_epi32(0x34a10fb0);  // 3e-7, nearer to the first code
    __m512i bits[4], size[4], line[4];
    __mmask16 before[4];
    for (int i = 0; i < 4; ++i) bits[i] = (__m512i)_mm512_mul_ps((__m512)load(values + 16 * i), factor);
    for (int i = 0; i < 4; ++i) {
      const __m512i value = (__m512i)load(values + 16 * i);
      size[i] = is_signed ? _mm512_max_epi32(_mm512_andnot_si512(sign, bits[i]), least)
                          : _mm512_mask_max_epi32(least, _mm512_test_epi32_mask(value, value), bits[i], above_zero);
    }
    for (int i = 0; i < 4; ++i) line[i] = _mm512_srli_epi32(size[i], 24);  // of its lowest five bits the highest is set
    for (int i = 0; i < 4; ++i)
      before[i] = _mm512_cmp_ps_mask((__m512)size[i], _mm512_permutexvar_ps(line[i], edge), _CMP_LE_OQ);
    for (int i = 0; i < 4; ++i) line[i] = _mm512_mask_xor_epi32(line[i], before[i], line[i], _mm512_set1_epi32(16));
    for (int i = 0; i < 4; ++i) {
      const __m512 along = _mm512_fmadd_ps((__m512)size[i], _mm512_permutex2var_ps(slope[0], line[i], slope[1]),
                                           _mm512_permutex2var_ps(offset[0], line[i], offset[1]));
      at[i] = (__m512i)_mm512_min_ps(along, _mm512_permutex2var_ps(top[0], line[i], top[1]));
    }
    if (!is_signed) return;
    for (int i = 0; i < 4; ++i) at[i] = _mm512_ternarylogic_epi32(at[i], bits[i], sign, 0x78);  // at ^ (bits & sign)
    for (int i = 0; i < 4; ++i) {
      const __m512 moved = _mm512_add_ps((__m512)at[i], _mm512_set1_ps(639.5f + 0x1p-14f));
      at[i] = (__m512i)_mm512_max_ps(moved, _mm512_set1_ps(512.5f));  // there is a code for 1, but none for -1
    }
  }

  void run(const float* values, float scale, int64_t n, uint8_t* codes) const {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t c = 0; c < n; c += 64) {
      __m512i at[4];
      places(values + c, factor, at);
      __mmask16 unsure = 0;
      for (int i = 0; i < 4; ++i) unsure |= _mm512_testn_epi32_mask(at[i], _mm512_set1_epi32(0x3ffc));
      if (__builtin_expect(unsure != 0, 0))
        for (int i = 0; i < 4; ++i)
          at[i] = (__m512i)(encode_moment<is_signed>(load(values + c + 16 * i), scale, bins) << 14);
      const __mmask64 present = n - c >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - c)) - 1;
      _mm512_mask_storeu_epi8(codes + c, present, pack(at));
    }
  }

  // Bits 14 to 21 of 64 lanes -> 64 bytes: one byte of each lane from each register, then in order.
  static __m512i pack(const __m512i (&at)[4]) {
    const auto choose = [](int32_t mask, __m512i a, __m512i b) {
      return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xca);
    };
    const __m512i low = choose(0xff, _mm512_srli_epi32(at[0], 14), _mm512_srli_epi32(at[1], 6));
    const __m512i high = choose(0xff0000, _mm512_slli_epi32(at[2], 2), _mm512_slli_epi32(at[3], 10));
    const __m512i by_lane = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                    _mm512_shuffle_epi8(choose(0xffff, low, high), by_lane));
  }
};
#else
typedef uint8_t byte_lanes __attribute__((vector_size(width)));

template <bool is_signed>
struct Encoder {
  const int32_t* bins;

  explicit Encoder(const AdamWMoment& m) : bins(m.bins) {}

  void run(const float* values, float scale, int64_t n, uint8_t* codes) const {
    each_register(n, [=](int64_t c, int64_t present) {
      const int_lanes code = encode_moment<is_signed>(load(values + c), scale, bins);
      const byte_lanes narrow = __builtin_convertvector(code, byte_lanes);
      std::memcpy(codes + c, &narrow, present);
    });
  }
};
#endif

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
  Encoder<is_signed>(moment).run(values, factor, n, moment.codes + index * block_size);
}

inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

struct Decoders {
  Decoder first, second;
};

// k registers, of which the last holds what is left of n values. m and v are replaced, and their largest magnitudes kept.
template <int k, class P, class G>
inline void update(P* param, const G* grad, int64_t n, const AdamWStep& hyper, float* m_of, float* v_of, bit_lanes& top_m,
                   bit_lanes& top_v) {
  lanes p[k], g[k], m[k], v[k];
  const auto present = [n](int i) { return k > 1 ? width : n - i * width; };
  for (int i = 0; i < k; ++i) g[i] = take(grad + i * width, present(i));
  for (int i = 0; i < k; ++i) m[i] = load(m_of + i * width) * hyper.beta1 + g[i] * hyper.rest1;
  for (int i = 0; i < k; ++i) v[i] = load(v_of + i * width) * hyper.beta2 + (g[i] * g[i]) * hyper.rest2;
  for (int i = 0; i < k; ++i) p[i] = take(param + i * width, present(i));
  move<k>(p, m, v, hyper);
  for (int i = 0; i < k; ++i) put(param + i * width, p[i], present(i));
  for (int i = 0; i < k; ++i) store(m_of + i * width, m[i]);
  for (int i = 0; i < k; ++i) store(v_of + i * width, v[i]);
  for (int i = 0; i < k; ++i) top_m = larger_bits(top_m, (bit_lanes)m[i] & 0x7fffffffu);
  for (int i = 0; i < k; ++i) top_v = larger_bits(top_v, (bit_lanes)v[i] & 0x7fffffffu);
}

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
  int64_t c = 0;
  for (; c + 4 * width <= n; c += 4 * width)
    update<4>(param + c, grad + c, 4 * width, hyper, m_of + c, v_of + c, top_m, top_v);
  for (; c < n; c += width)
    update<1>(param + c, grad + c, n - c < width ? n - c : width, hyper, m_of + c, v_of + c, top_m, top_v);
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
