// Products of bfloat16 tiles on Intel AMX: 16x32 times 32x16, accumulated in float. For the amx build alone.
#pragma once

#include <cstdint>

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace veneer {
namespace {

constexpr int64_t tile_rows = 16, tile_depth = 32;                // a tile holds 16 rows of 32 bf16, or 16 pairs x 16 x 2
constexpr int64_t tile_elements = tile_rows * tile_depth;         // 1 KiB

// The tile intrinsics of some compilers do not say that they read or write memory: without this, stores made just before
// may be moved past them, and loads just after before them.
inline void amx_fence() { asm volatile("" : : : "memory"); }

struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All eight tiles of this thread become 16 rows of 64 bytes.
inline void amx_begin() {
  const TileShape shape;
  asm volatile("" : : "r"(&shape) : "memory");
  _tile_loadconfig(&shape);
}

inline void amx_end() { _tile_release(); }

// c (2 x 2 tiles of 16 x 16 floats, one after the other) = sum over depth of a0|a1 (rows) times b0|b1 (columns). Tiles that
// follow each other in depth are contiguous.
inline void amx_2x2(const uint16_t* a0, const uint16_t* a1, const uint16_t* b0, const uint16_t* b1,
                                      int64_t depth_tiles, float* c) {
  amx_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth_tiles; ++k) {
    _tile_loadd(4, a0 + k * tile_elements, 64);
    _tile_loadd(6, b0 + k * tile_elements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + k * tile_elements, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + k * tile_elements, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
  amx_fence();
}

// c (2 tiles of 16 x 16 floats) = a0|a1 (rows) times b0 (columns).
inline void amx_2x1(const uint16_t* a0, const uint16_t* a1, const uint16_t* b0, int64_t depth_tiles,
                                      float* c) {
  amx_fence();
  _tile_zero(0);
  _tile_zero(2);
  for (int64_t k = 0; k < depth_tiles; ++k) {
    _tile_loadd(6, b0 + k * tile_elements, 64);
    _tile_loadd(4, a0 + k * tile_elements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a1 + k * tile_elements, 64);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, c, 64);
  _tile_stored(2, c + 256, 64);
  amx_fence();
}

// ---- packing into tiles ---------------------------------------------------------------------------------------------

// Sixteen rows of 32-bit lanes become sixteen columns.
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1u; }

// rows x depth of a row-major matrix -> one tile of rows (a left operand); what is missing is zero.
inline void pack_left(const uint16_t* x, int64_t stride, int64_t rows, int64_t depth, uint16_t* tile) {
  const __mmask32 lanes = first_lanes(depth);
  for (int64_t r = 0; r < tile_rows; ++r)
    _mm512_storeu_si512(tile + r * 32, r < rows ? _mm512_maskz_loadu_epi16(lanes, x + r * stride) : _mm512_setzero_si512());
}

// The same rows as columns of pairs (a right operand).
inline void pack_right(const uint16_t* x, int64_t stride, int64_t rows, int64_t depth, uint16_t* tile) {
  const __mmask32 lanes = first_lanes(depth);
  __m512i r[16];
  for (int64_t i = 0; i < 16; ++i)
    r[i] = i < rows ? _mm512_maskz_loadu_epi16(lanes, x + i * stride) : _mm512_setzero_si512();
  transpose16(r);
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 32, r[i]);
}

// ---- unpacking results ----------------------------------------------------------------------------------------------

// c: 16 x 16 floats, its columns the rows of out. Writes out[m * stride + n] = bf16(c[n][m]) for n < width, m < rows.
inline void store_transposed(const float* c, uint16_t* out, int64_t stride, int64_t width, int64_t rows) {
  __m512i z[8], t[8];
  for (int p = 0; p < 8; ++p)
    z[p] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + (p + 8) * 16), _mm512_loadu_ps(c + p * 16));
  for (int p = 0; p < 8; p += 2) {  // 8 x 8 words within each 128 bits
    t[p] = _mm512_unpacklo_epi16(z[p], z[p + 1]);
    t[p + 1] = _mm512_unpackhi_epi16(z[p], z[p + 1]);
  }
  for (int p = 0; p < 8; p += 4) {
    z[p] = _mm512_unpacklo_epi32(t[p], t[p + 2]);
    z[p + 1] = _mm512_unpackhi_epi32(t[p], t[p + 2]);
    z[p + 2] = _mm512_unpacklo_epi32(t[p + 1], t[p + 3]);
    z[p + 3] = _mm512_unpackhi_epi32(t[p + 1], t[p + 3]);
  }
  for (int p = 0; p < 4; ++p) {
    t[2 * p] = _mm512_unpacklo_epi64(z[p], z[p + 4]);
    t[2 * p + 1] = _mm512_unpackhi_epi64(z[p], z[p + 4]);
  }
  const __mmask16 lanes = static_cast<__mmask16>(width >= 16 ? 0xffff : (1 << width) - 1);
  for (int m = 0; m < 8; ++m) {
    const __m512i halves = _mm512_shuffle_i64x2(t[m], t[m], 0xd8);  // rows m and m + 8, n in order
    if (m < rows) _mm256_mask_storeu_epi16(out + m * stride, lanes, _mm512_castsi512_si256(halves));
    if (m + 8 < rows) _mm256_mask_storeu_epi16(out + (m + 8) * stride, lanes, _mm512_extracti64x4_epi64(halves, 1));
  }
}

}  // namespace
}  // namespace veneer
#endif
