#include "coded/coded.h"
#include "coded/ggml_blocks.h"
#include "coded/product.h"
#include "coded/scaled.h"

namespace veneer {
namespace VENEER_ISA {
namespace {

template <class Matrix>
void decode(const Matrix& w, float* out) {
  decode_rows(rows_of(w), out);
}

template <class Matrix>
void multiply(const Matrix& w, const float* x, int64_t rows, float* out) {
  multiply_rows(rows_of(w), x, rows, out);
}

}  // namespace

const CodedKernels coded = {decode<GgmlMatrix>, decode<ScaledMatrix>, multiply<GgmlMatrix>, multiply<ScaledMatrix>};

}  // namespace VENEER_ISA
}  // namespace veneer
