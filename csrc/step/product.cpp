#include <cstring>

#include "packed/packed.h"
#include "scale/scale.h"
#include "step/instructions.h"
#include "stream/stream.h"

namespace veneer {
namespace {

constexpr int64_t alignment = 64;

int64_t padded(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

void copy_rows(const Pass& pass, const Rows& from, const Rows& to, int64_t start, int64_t stop, int64_t d) {
  for (int64_t r = start; r < stop; ++r) std::memcpy(pass.from_row(to, r).data, pass.from_row(from, r).data, d * pass.bytes());
}

// Panels of another weight of a layer's shape, which is not in codes.
PanelMatrix dense_like(const PanelMatrix& m, const void* panels) {
  const int64_t depth = m.dtype == Dtype::bfloat16 ? (m.i + 31) / 32 * 32 : m.i;
  return {m.o, m.i, depth, m.dtype, const_cast<void*>(panels)};
}

void scale_rows(const Pass& pass, const Rows& z, int64_t n, int64_t d, const float* scale, const float* bias) {
  if (scale == nullptr && bias == nullptr) return;
  scale_kernels().forward({n, d, pass.dtype}, z, scale, bias, z);
}

}  // namespace

void TermAt::apply(const Pass& pass, const char* block, int64_t n, const Rows& x, const Rows& y, const PanelMatrix& weight) const {
  const Term term{kind, {sizes[0], sizes[1], sizes[2], sizes[3]}, values.in<float>(block), index.in<int32_t>(block)};
  if (kind == TermKind::hadamard) {
    const int64_t outputs = (weight.o + 15) / 16 * 16;
    char* panels = pass.threads.of(0).rows.at_least(outputs * weight.depth * pass.bytes());
    terms_kernels().make(term, weight, panels, pass.scratch.at_least(terms_kernels().make_bytes(term)));
    return multiply_rows(pass, dense_like(weight, panels), x, y, y, n);
  }
  void* scratch = pass.scratch.at_least(terms_kernels().scratch_bytes(term));
  terms_kernels().apply({term, n, pass.dtype, x, y, role == Role::add, scratch});
}

// Of each layer what it reads and what it writes. `onto`: what is added before the rounding, without data nothing is.
// `joint`: the outputs lie side by side and all layers read the same.
struct ProductInstruction::Operands {
  std::vector<Rows> x, y, onto;
  bool joint;
  Rows joint_onto;
  std::vector<VersionRun> apart;
};

ProductInstruction::ProductInstruction(size_t number, std::vector<Layer> layers, const void* joined, const void* joined_bias, int source,
                                       int stream, int beside)
    : number_(number), layers_(std::move(layers)), joined_(joined), joined_bias_(joined_bias), source_(source), stream_(stream), beside_(beside) {
  for (const Layer& layer : layers_) heights_.push_back(layer.weight.o);
  after_ = weight();
}

PanelMatrix ProductInstruction::weight() const {
  PanelMatrix first = layers_[0].weight;
  if (joined_ == nullptr) return first;
  first.o = 0;
  for (int64_t height : heights_) first.o += height;
  first.values = const_cast<void*>(joined_);
  return first;
}

const Change* ProductInstruction::change_of(const Pass& pass, int64_t version) const { return pass.blocks[version].change(number_); }

const LayerChange* ProductInstruction::change_of(const Pass& pass, int64_t version, size_t layer) const {
  const Change* change = change_of(pass, version);
  return change == nullptr || change->layers.empty() ? nullptr : &change->layers[layer];
}

bool ProductInstruction::is_apart(const Pass& pass, const VersionRun& run) const {
  return change_of(pass, run.version, 0) != nullptr || bottlenecks_.of(run.version) != nullptr;
}

void ProductInstruction::run(const Pass& pass) const {
  Operands at;
  at.joint = joined_ != nullptr;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Rows y = stream_ >= 0 ? pass.registers[stream_] : pass.registers[layers_[i].target];
    at.x.push_back(pass.registers[source_]);
    at.y.push_back(y);
    at.onto.push_back(stream_ >= 0 ? y : Rows{const_cast<void*>(layers_[i].bias), 0});
    if (i == 0) continue;
    const Rows& before = at.y[i - 1];
    const char* end = static_cast<char*>(before.data) + heights_[i - 1] * pass.bytes();
    at.joint = at.joint && y.data == end && y.stride == before.stride;
  }
  at.joint_onto = {const_cast<void*>(joined_bias_), 0};
  for (int64_t r = 0; r < pass.n_runs; ++r)
    if (is_apart(pass, pass.runs[r])) at.apart.push_back(pass.runs[r]);
  if (!at.apart.empty()) return run_mixed(pass, std::move(at));
  multiply(pass, at);
  add_joint_pairs(pass, at);
}

void multiply_rows(const Pass& pass, const PanelMatrix& weight, const Rows& x, const Rows& y, const Rows& onto, int64_t n,
                   const PanelMatrix* after) {
  PackedProduct call{weight, n, {x.data, x.stride, pass.dtype}, {y.data, y.stride, pass.dtype}, {onto.data, onto.stride, pass.dtype},
                     nullptr, after};
  call.scratch = pass.scratch.at_least(packed_kernels().scratch_bytes(call));
  packed_kernels().matmul(call);
}

void ProductInstruction::multiply(const Pass& pass, const Operands& at) const {
  if (at.joint) return multiply_rows(pass, weight(), at.x[0], at.y[0], at.joint_onto, pass.n, &after_);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const PanelMatrix* after = i + 1 < layers_.size() ? &layers_[i + 1].weight : &after_;
    multiply_rows(pass, layers_[i].weight, at.x[i], at.y[i], at.onto[i], pass.n, after);
  }
}

void ProductInstruction::add_joint_pairs(const Pass& pass, const Operands& at) const {
  Segments segments(pass.n_runs);
  for (const VersionRun* run = pass.runs; run < pass.runs + pass.n_runs; ++run) {
    const Change* change = change_of(pass, run->version);
    if (change != nullptr && change->pairs.factors.at != 0)
      segments.add(change->pairs, pass.blocks[run->version].data, run->start, run->stop);
  }
  add_pairs(pass, segments, pass.registers[source_], layers_[0].weight.i, at.y.data(), heights_);
}

// Some versions do more than add pairs. All rows go through the weights in one pass all the same; what is added before the
// rounding, the stream or a bias, is laid into the output, and is zero for the rows of those versions.
void ProductInstruction::run_mixed(const Pass& pass, Operands at) const {
  const int64_t in = pass.n * layers_[0].weight.i * pass.bytes(), out = stream_ >= 0 ? pass.n * heights_[0] * pass.bytes() : 0;
  char* memory = pass.rows.at_least(padded(in) * static_cast<int64_t>(layers_.size()) + out);
  for (size_t i = 0; i < layers_.size(); ++i) lay_input(pass, memory + padded(in) * i, i, at);
  if (stream_ >= 0) at.y[0] = {memory + padded(in), heights_[0]};
  for (size_t i = 0; i < layers_.size(); ++i) begin_output(pass, i, at);
  multiply(pass, at);
  add_joint_pairs(pass, at);
  for (const VersionRun& run : at.apart) change_rows(pass, at, run);
  if (stream_ < 0) return;
  change_halves(pass, bottlenecks_, heights_[0], pass.registers[beside_], at.y[0]);
  into_stream(pass, at);
}

void ProductInstruction::lay_input(const Pass& pass, char* memory, size_t i, Operands& at) const {
  const Rows x = pass.registers[source_], own{memory, layers_[i].weight.i};
  const auto mapped = [&](const VersionRun& run) -> const LayerChange* {
    const LayerChange* change = change_of(pass, run.version, i);
    return change == nullptr || !change->maps_input() ? nullptr : change;
  };
  bool any = false;
  for (const VersionRun& run : at.apart) any = any || mapped(run) != nullptr;
  if (!any) return;
  copy_rows(pass, x, own, 0, pass.n, own.stride);
  for (const VersionRun& run : at.apart) {
    const LayerChange* change = mapped(run);
    if (change == nullptr) continue;
    const char* block = pass.blocks[run.version].data;
    const Rows rows = pass.from_row(own, run.start);
    scale_rows(pass, rows, run.stop - run.start, own.stride, change->in_scale.in<float>(block), nullptr);
    change->apply(Role::input, pass, block, run.stop - run.start, rows, rows, layers_[i].weight);
  }
  at.x[i] = own;
  at.joint = false;
}

void ProductInstruction::begin_output(const Pass& pass, size_t i, Operands& at) const {
  const int64_t d = heights_[i];
  const Rows onto = at.onto[i], y = at.y[i];
  if (onto.data == nullptr) {
    at.joint = at.joint && joined_bias_ == nullptr;
    return;
  }
  each_gap(at.apart, pass.n, [&](int64_t start, int64_t stop) { copy_rows(pass, onto, y, start, stop, d); });
  for (const VersionRun& run : at.apart)
    for (int64_t r = run.start; r < run.stop; ++r) std::memset(pass.from_row(y, r).data, 0, d * pass.bytes());
  at.onto[i] = y;
  at.joint = false;
}

void ProductInstruction::change_rows(const Pass& pass, const Operands& at, const VersionRun& run) const {
  if (change_of(pass, run.version, 0) == nullptr) return;
  const int64_t n = run.stop - run.start;
  const char* block = pass.blocks[run.version].data;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LayerChange& own = *change_of(pass, run.version, i);
    const Rows x = pass.from_row(at.x[i], run.start), y = pass.from_row(at.y[i], run.start);
    if (own.pairs.factors.at != 0) {
      Segments segment(1);
      segment.add(own.pairs, block, 0, n);
      add_pairs(pass, segment, x, layers_[i].weight.i, &y, {heights_[i]});
    }
    own.apply(Role::add, pass, block, n, x, y, layers_[i].weight);
    own.apply(Role::output, pass, block, n, y, y, layers_[i].weight);
    const std::vector<float>& base = layers_[i].wide_bias;
    const float* bias = own.wide_bias.at != 0 ? own.wide_bias.in<float>(block) : base.empty() ? nullptr : base.data();
    scale_rows(pass, y, n, heights_[i], own.out_scale.in<float>(block), bias);
    if (own.whole.at == 0) continue;
    const PanelMatrix weight = dense_like(layers_[i].weight, own.whole.in<char>(block));
    const void* beside = own.bias.at != 0 ? own.bias.in<char>(block) : layers_[i].bias;
    multiply_rows(pass, weight, pass.from_row(pass.registers[source_], run.start), y, {const_cast<void*>(beside), 0}, n);
  }
}

void ProductInstruction::into_stream(const Pass& pass, const Operands& at) const {
  const Rows h = pass.registers[stream_], y = at.y[0];
  const int64_t d = heights_[0];
  each_gap(at.apart, pass.n, [&](int64_t start, int64_t stop) { copy_rows(pass, y, h, start, stop, d); });
  for (const VersionRun& run : at.apart)
    stream_kernels().add({run.stop - run.start, d, pass.dtype}, 1.0f, pass.from_row(y, run.start), pass.from_row(h, run.start));
}

}  // namespace veneer
