// A decoder's program: instructions, and a pass through them by one call. They call the kernels of the families, the same
// that the ops call one by one, so that a pass gives the same bits as these do. Compiled once: nothing here computes.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "conv/conv.h"
#include "core/panels.h"
#include "delta/delta.h"
#include "experts/mixture.h"
#include "glu/glu.h"
#include "step/pass.h"
#include "step/versions.h"

namespace veneer {

struct NormParts {
  bool subtracts_mean;
  float eps;
  std::vector<float> weight, bias;  // with any offset; bias may be empty
};

class Instruction {
 public:
  virtual ~Instruction() = default;
  virtual void run(const Pass& pass) const = 0;
  virtual void take(int64_t, const Bottleneck&) {}
  virtual void take_norm(int64_t, const NormParts&) {}
  virtual void drop(int64_t) {}
};

// The stream begins: rows of a table, in the rows' dtype, times one multiplier after the other, rounded each time. Throws
// out_of_range for an id that has none.
class EmbeddingInstruction final : public Instruction {
 public:
  EmbeddingInstruction(const void* table, int64_t n, int64_t d, const std::vector<float>& multipliers, int target);
  void run(const Pass& pass) const override;

 private:
  const void* table_;
  int64_t n_, d_;
  std::vector<std::vector<float>> scales_;  // a multiplier for each column
  int target_;
};

// y (n, d), one row behind the other.
void normalize(const Pass& pass, const NormParts& norm, const Rows& x, int64_t n, void* y);

// A norm, and those that versions have instead.
struct Norms {
  NormParts base;  // without a weight: no norm
  OfVersions<NormParts> own;

  // y (n, d), one row behind the other; `runs` are those of these rows. May be x.
  void run(const Pass& pass, const std::vector<VersionRun>& runs, const Rows& x, int64_t n, void* y) const;
};

class NormInstruction final : public Instruction {
 public:
  NormInstruction(NormParts norm, int source, int target) : norms_{std::move(norm), {}}, source_(source), target_(target) {}
  void run(const Pass& pass) const override;
  void take_norm(int64_t version, const NormParts& norm) override { norms_.own.take(version, norm); }
  void drop(int64_t version) override { norms_.own.drop(version); }

 private:
  Norms norms_;
  int source_, target_;
};

struct Layer {
  PanelMatrix weight;
  const void* bias;             // of the rows' dtype; null: none
  std::vector<float> wide_bias;  // the same in float
  int target;
};

// y = onto + W x for n rows; `onto` without data is nothing. `after`: the weight of the product that follows, if it is known.
void multiply_rows(const Pass& pass, const PanelMatrix& weight, const Rows& x, const Rows& y, const Rows& onto, int64_t n,
                   const PanelMatrix* after = nullptr);

// Layers that read the same x, with what versions do to them. `stream`: the one layer's output is added to that register
// instead of being written, bottlenecks between that read it or the register `beside`; -1: written.
class ProductInstruction final : public Instruction {
 public:
  ProductInstruction(size_t number, std::vector<Layer> layers, const void* joined, const void* joined_bias, int source, int stream,
                     int beside);
  void run(const Pass& pass) const override;
  void take(int64_t version, const Bottleneck& bottleneck) override { bottlenecks_.take(version, bottleneck); }
  void drop(int64_t version) override { bottlenecks_.drop(version); }
  PanelMatrix weight() const;  // of all layers where they are joined, else of the first
  void precede(const ProductInstruction& next) { after_ = next.weight(); }

 private:
  struct Operands;
  const Change* change_of(const Pass& pass, int64_t version) const;
  const LayerChange* change_of(const Pass& pass, int64_t version, size_t layer) const;
  bool is_apart(const Pass& pass, const VersionRun& run) const;
  void multiply(const Pass& pass, const Operands& at) const;
  void add_joint_pairs(const Pass& pass, const Operands& at) const;
  void run_mixed(const Pass& pass, Operands at) const;
  void lay_input(const Pass& pass, char* memory, size_t i, Operands& at) const;
  void begin_output(const Pass& pass, size_t i, Operands& at) const;
  void change_rows(const Pass& pass, const Operands& at, const VersionRun& run) const;
  void into_stream(const Pass& pass, const Operands& at) const;

  size_t number_;  // in the program
  std::vector<Layer> layers_;
  std::vector<int64_t> heights_;
  const void *joined_, *joined_bias_;
  PanelMatrix after_;  // of the product that follows in a pass; itself, until that is known
  int source_, stream_, beside_;
  Bottlenecks bottlenecks_;
};

// Bottlenecks of versions at a half's output `target`, whose input is `source`.
class ChangeInstruction final : public Instruction {
 public:
  ChangeInstruction(int64_t d, int source, int target) : d_(d), source_(source), target_(target) {}
  void run(const Pass& pass) const override { change_halves(pass, bottlenecks_, d_, pass.registers[source_], pass.registers[target_]); }
  void take(int64_t version, const Bottleneck& bottleneck) override { bottlenecks_.take(version, bottleneck); }
  void drop(int64_t version) override { bottlenecks_.drop(version); }

 private:
  int64_t d_;
  int source_, target_;
  Bottlenecks bottlenecks_;
};

// Queries, keys or values: register, first value, values from head to head of one key head, and from the first of one key
// head to that of the next.
struct HeadsAt {
  int source;
  int64_t first, apart, of_key;
};

struct Heads {  // the same in memory, of all rows
  PagedRows rows;
  int64_t of_key;
};

// Queries, keys and values of a product: normed, turned (or the other way round), appended to the pages; then what the queries see. Where sequences can
// be shared out evenly, each thread takes its own through all of that: what it reads it has just written.
class AttentionInstruction final : public Instruction {
 public:
  struct Parts {
    int64_t layer, q_heads, kv_heads, head_dim, half;  // half: pairs that turn
    HeadsAt q, k, v;
    int table;  // of turns; -1: none
    bool interleaved, norms_last;  // norms_last: after the turn
    PagedOptions options;
    int target;
  };
  AttentionInstruction(const Parts& parts, NormParts q_norm, NormParts k_norm)
      : parts_(parts), q_norm_(std::move(q_norm)), k_norm_(std::move(k_norm)) {}
  void run(const Pass& pass) const override;

 private:
  struct Share;
  void run_rows(const Pass& pass) const;
  void make_room(const Pass& pass) const;
  int64_t heads_bytes(const Pass& pass, int64_t n_heads) const { return pass.n * n_heads * parts_.head_dim * pass.bytes(); }
  PagedCall call_of(const Pass& pass, const Heads& q) const;
  Heads heads(const Pass& pass, const HeadsAt& at) const;
  Heads normed(const Pass& pass, const NormParts& norm, const Heads& x, int64_t n_heads, char* memory) const;
  void turn(const Pass& pass, const Heads& x, int64_t n_heads) const;

  Parts parts_;
  NormParts q_norm_, k_norm_;  // without weights: no norm
};

// The gate is a register; what it multiplies begins at a value of a register, of the same one where both are one output.
class GluInstruction final : public Instruction {
 public:
  GluInstruction(Activation activation, int64_t d, int gate, int up, int64_t up_first, int target)
      : activation_(activation), d_(d), up_first_(up_first), gate_(gate), up_(up), target_(target) {}
  void run(const Pass& pass) const override;

 private:
  Activation activation_;
  int64_t d_, up_first_;
  int gate_, up_, target_;
};

class ConvInstruction final : public Instruction {  // between two gates: the source holds the first, the last, and x
 public:
  ConvInstruction(int64_t d, int64_t kernel, int64_t layer, const float* weight, const float* bias, int source, int target)
      : d_(d), kernel_(kernel), layer_(layer), weight_(weight), bias_(bias), source_(source), target_(target) {}
  void run(const Pass& pass) const override;

 private:
  int64_t d_, kernel_, layer_;
  const float *weight_, *bias_;
  int source_, target_;
};

class DeltaInstruction final : public Instruction {
 public:
  struct Part {
    int source;
    int64_t first, apart;  // the first head's first value, and values from one key head to the next
  };
  DeltaInstruction(const DeltaSizes& sizes, const DeltaWeights& weights, int64_t layer, std::vector<Part> parts, int target)
      : sizes_(sizes), weights_(weights), layer_(layer), parts_(std::move(parts)), target_(target) {}
  void run(const Pass& pass) const override;

 private:
  DeltaSizes sizes_;
  DeltaWeights weights_;
  int64_t layer_;
  std::vector<Part> parts_;  // q, k, v, z, b, a
  int target_;
};

class ActivationInstruction final : public Instruction {
 public:
  ActivationInstruction(Activation activation, int64_t d, int source, int target)
      : activation_(activation), d_(d), source_(source), target_(target) {}
  void run(const Pass& pass) const override;

 private:
  Activation activation_;
  int64_t d_;
  int source_, target_;
};

// Rows through the experts that their scores choose, with the pairs of versions; `shared` and its gate are registers too, -1: there
// is none.
class ExpertsInstruction final : public Instruction {
 public:
  struct At {
    int scores, source, shared, shared_gate, target;
  };
  ExpertsInstruction(size_t number, const Router& router, const Mixture& mixture, const At& at)
      : number_(number), router_(router), mixture_(mixture), at_(at) {}
  void run(const Pass& pass) const override;

 private:
  std::vector<MixtureSegment> segments(const Pass& pass) const;

  size_t number_;  // in the program
  Router router_;
  Mixture mixture_;
  At at_;
};

// The likeliest tokens of the rows that are picked: the last norm, the head's product, its logits times a positive scale.
class HeadInstruction final : public Instruction {
 public:
  HeadInstruction(NormParts norm, Layer head, int64_t output_bytes, int source, float scale)
      : norms_{std::move(norm), {}}, head_(std::move(head)), output_bytes_(output_bytes), source_(source), scale_(scale) {}
  void run(const Pass& pass) const override;
  void take_norm(int64_t version, const NormParts& norm) override { norms_.own.take(version, norm); }
  void drop(int64_t version) override { norms_.own.drop(version); }

 private:
  Norms norms_;
  Layer head_;
  int64_t output_bytes_;  // of an output in the panels
  int source_;
  float scale_;
};

// h += multiplier * source
class AddInstruction final : public Instruction {
 public:
  AddInstruction(int64_t d, float multiplier, int source, int stream)
      : d_(d), multiplier_(multiplier), source_(source), stream_(stream) {}
  void run(const Pass& pass) const override;

 private:
  int64_t d_;
  float multiplier_;
  int source_, stream_;
};

}  // namespace veneer
