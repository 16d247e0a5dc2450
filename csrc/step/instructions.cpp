#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "activation/activation.h"
#include "norm/norm.h"
#include "scale/scale.h"
#include "step/instructions.h"
#include "stream/stream.h"

namespace veneer {

Memory::~Memory() { std::free(data_); }

char* Memory::at_least(int64_t bytes) {
  if (bytes <= size_) return data_;
  std::free(data_);
  size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
  data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size_)));
  if (data_ != nullptr) return data_;
  size_ = 0;
  throw std::bad_alloc();
}

void normalize(const Pass& pass, const NormParts& norm, const Rows& x, int64_t n, void* y) {
  const int64_t d = norm.weight.size();
  float* statistics = reinterpret_cast<float*>(pass.scratch.at_least(2 * n * sizeof(float)));
  const NormRows rows{x.data, x.stride, n, d, pass.dtype, norm.subtracts_mean ? statistics + n : nullptr, statistics};
  norm_kernels().forward(rows, {norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data()}, norm.eps, y);
}

void Norms::run(const Pass& pass, const std::vector<VersionRun>& runs, const Rows& x, int64_t n, void* y) const {
  const auto rows = [&](const NormParts& norm, int64_t start, int64_t stop) {
    const int64_t d = norm.weight.size();
    normalize(pass, norm, pass.from_row(x, start), stop - start, static_cast<char*>(y) + start * d * pass.bytes());
  };
  std::vector<VersionRun> apart;
  for (const VersionRun& each : runs)
    if (each.start < each.stop && own.of(each.version) != nullptr) apart.push_back(each);
  each_gap(apart, n, [&](int64_t start, int64_t stop) { rows(base, start, stop); });
  for (const VersionRun& each : apart) rows(*own.of(each.version), each.start, each.stop);
}

void NormInstruction::run(const Pass& pass) const {
  norms_.run(pass, {pass.runs, pass.runs + pass.n_runs}, pass.registers[source_], pass.n, pass.registers[target_].data);
}

EmbeddingInstruction::EmbeddingInstruction(const void* table, int64_t n, int64_t d, const std::vector<float>& multipliers, int target)
    : table_(table), n_(n), d_(d), target_(target) {
  for (float multiplier : multipliers) scales_.emplace_back(d, multiplier);
}

void EmbeddingInstruction::run(const Pass& pass) const {
  const Rows h = pass.registers[target_];
  const int64_t bytes = d_ * pass.bytes();
  for (int64_t r = 0; r < pass.n; ++r)
    if (pass.ids[r] < 0 || pass.ids[r] >= n_) throw std::out_of_range("a token's id is not in the table of embeddings");
  for (int64_t r = 0; r < pass.n; ++r)
    std::memcpy(pass.from_row(h, r).data, static_cast<const char*>(table_) + pass.ids[r] * bytes, bytes);
  for (const std::vector<float>& scale : scales_) scale_kernels().forward({pass.n, d_, pass.dtype}, h, scale.data(), nullptr, h);
}

void GluInstruction::run(const Pass& pass) const {
  Rows up = pass.registers[up_];
  up.data = static_cast<char*>(up.data) + up_first_ * pass.bytes();
  glu_kernels().forward({pass.n, d_, pass.dtype, activation_}, pass.registers[gate_], up, pass.registers[target_]);
}

void ConvInstruction::run(const Pass& pass) const {
  const Rows& source = pass.registers[source_];
  const auto third = [&](int64_t i) { return Rows{static_cast<char*>(source.data) + i * d_ * pass.bytes(), source.stride}; };
  conv_kernels().windowed({pass.n, d_, kernel_, pass.dtype, false, nullptr, weight_, bias_},
                          {pass.windows, pass.window_layers, pass.store.block, layer_}, pass.batch,
                          {third(0), third(2), third(1)}, pass.registers[target_]);
}

void DeltaInstruction::run(const Pass& pass) const {
  const auto part = [&](size_t i) {
    Rows rows = pass.registers[parts_[i].source];
    rows.data = static_cast<char*>(rows.data) + parts_[i].first * pass.bytes();
    return DeltaPart{rows, parts_[i].apart};
  };
  delta_kernels().in_pages(sizes_, weights_, {pass.states, pass.state_layers, pass.store.block, layer_}, pass.batch,
                           {part(0), part(1), part(2), part(3), part(4), part(5)}, pass.registers[target_],
                           pass.scratch.at_least(delta_kernels().scratch_bytes(sizes_)));
}

void ActivationInstruction::run(const Pass& pass) const {
  activation_kernels().forward({pass.n, d_, pass.dtype, activation_}, pass.registers[source_], pass.registers[target_]);
}

std::vector<MixtureSegment> ExpertsInstruction::segments(const Pass& pass) const {
  std::vector<MixtureSegment> found;
  for (const VersionRun* run = pass.runs; run < pass.runs + pass.n_runs; ++run) {
    const Change* change = pass.blocks[run->version].change(number_);
    if (change == nullptr) continue;
    const auto pairs = [&](size_t layer) {
      const Pairs& own = change->layers[layer].pairs;
      const char* factors = own.factors.in<char>(pass.blocks[run->version].data);
      return factors == nullptr ? ExpertPairs{} : ExpertPairs{factors, own.ranks[0]};
    };
    found.push_back({run->start, run->stop, pairs(0), pairs(1)});
  }
  return found;
}

void ExpertsInstruction::run(const Pass& pass) const {
  const auto at = [&](int number) { return number < 0 ? Rows{nullptr, 0} : pass.registers[number]; };
  const int64_t chosen = pass.n * router_.k;
  int64_t* ids = reinterpret_cast<int64_t*>(pass.rows.at_least(chosen * static_cast<int64_t>(sizeof(int64_t) + sizeof(float))));
  float* weights = reinterpret_cast<float*>(ids + chosen);
  experts_kernels().route(router_, {pass.n, pass.dtype, at(at_.scores), ids, weights});
  const MixtureRows rows{pass.n, pass.dtype, at(at_.source), ids, weights, at(at_.shared), at(at_.shared_gate), at(at_.target),
                         segments(pass)};
  run_mixture(mixture_, rows, pass.scratch.at_least(mixture_bytes(mixture_, rows)));
}

void AddInstruction::run(const Pass& pass) const {
  stream_kernels().add({pass.n, d_, pass.dtype}, multiplier_, pass.registers[source_], pass.registers[stream_]);
}

}  // namespace veneer
