// A decoder's program: instructions, and a pass through them by one call. They call the kernels of the families, the same
// that the ops call one by one, so that a pass gives the same bits as these do. Compiled once: nothing here computes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/numeric.h"
#include "core/panels.h"
#include "core/rows.h"
#include "glu/glu.h"
#include "paged_attention/paged_attention.h"
#include "pairs/pairs.h"
#include "terms/terms.h"

namespace veneer {

// Memory that grows and is kept, so that a step takes no fresh pages from the system.
class Memory {
 public:
  ~Memory();
  char* at_least(int64_t bytes);  // throws bad_alloc

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// A scratch and rows for each thread, where threads go through parts of a pass by themselves.
class ThreadMemory {
 public:
  struct Own {
    Memory scratch, rows;
  };
  Own& of(size_t thread) {
    while (owned_.size() <= thread) owned_.push_back(std::make_unique<Own>());
    return *owned_[thread];
  }

 private:
  std::vector<std::unique_ptr<Own>> owned_;
};

struct VersionRun {  // rows [start, stop) take a version; all others are the base's
  int64_t version, start, stop;
};

struct TurnTable {  // (n, half): cosines and sines of each row
  const float *cos, *sin;
};

struct Block;

struct Pass {
  int64_t n;
  Dtype dtype;            // of all rows
  const Rows* registers;  // by number
  PagedStore store;
  PagedBatch batch;
  const TurnTable* turns;
  const VersionRun* runs;
  int64_t n_runs;
  const Block* blocks;  // of versions, by number
  const int64_t* ids;     // of tokens, where they are embedded
  const int64_t* picked;  // rows whose likeliest token is asked for
  int64_t n_picked;
  int64_t* tokens;        // takes them; -1 where a logit is not finite
  Memory &scratch, &rows;  // of kernels; of rows that have no register
  ThreadMemory& threads;

  int64_t bytes() const { return dtype == Dtype::float32 ? 4 : 2; }  // of a value
  Rows from_row(const Rows& rows_, int64_t r) const {
    return {static_cast<char*>(rows_.data) + r * rows_.stride * bytes(), rows_.stride};
  }
};

struct Bottleneck;

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

// What versions have at one place, by their numbers.
template <class T>
class OfVersions {
 public:
  void take(int64_t version, T change) {
    if (version >= static_cast<int64_t>(held_.size())) held_.resize(version + 1);
    held_[version] = std::make_unique<T>(std::move(change));
  }
  void drop(int64_t version) {
    if (version < static_cast<int64_t>(held_.size())) held_[version].reset();
  }
  const T* of(int64_t version) const { return version < static_cast<int64_t>(held_.size()) ? held_[version].get() : nullptr; }

 private:
  std::vector<std::unique_ptr<T>> held_;
};

// f(start, stop) for the rows between runs.
template <class F>
void each_gap(const std::vector<VersionRun>& runs, int64_t n, const F& f) {
  int64_t reached = 0;
  for (const VersionRun& run : runs) {
    if (run.start > reached) f(reached, run.start);
    reached = run.stop;
  }
  if (reached < n) f(reached, n);
}

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

// Where something lies: so many bytes behind the start of a version's block, or at an address where there is no block; 0: nowhere.
struct Place {
  int64_t at = 0;

  template <class T>
  const T* in(const char* block) const {
    return at == 0 ? nullptr : reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(at));
  }
};

// Packed pairs of versions at layers that share their input; without factors there are none.
struct Pairs {
  Place factors;
  std::vector<int64_t> ranks;
  bool has_middle = false, shares_a = false;
  Activation activation{};
  Place core, bias, out_scale, out_bias;
};

// Rows of one or more versions with their pairs.
class Segments {
 public:
  explicit Segments(size_t most) { middles_.reserve(most); }
  void add(const Pairs& pairs, const char* block, int64_t start, int64_t stop) {
    const PairsMiddle* middle = nullptr;
    if (pairs.has_middle) {
      middles_.push_back({pairs.shares_a, pairs.core.in<float>(block), pairs.bias.in<float>(block), pairs.activation,
                          pairs.out_scale.in<float>(block), pairs.out_bias.in<float>(block)});
      middle = &middles_.back();
    }
    parts.push_back({pairs.factors.in<char>(block), pairs.ranks.data(), start, stop, middle});
  }
  std::vector<PairsSegment> parts;

 private:
  std::vector<PairsMiddle> middles_;
};

// Adds the pairs of segments to rows `ys` of as many layers as there are `heights`; x (…, in_features) may be what is added to.
void add_pairs(const Pass& pass, const Segments& segments, const Rows& x, int64_t in_features, const Rows* ys,
               const std::vector<int64_t>& heights);

struct Bottleneck {
  Pairs pairs;
  bool reads_output;  // of the half that it changes, else its input
};
using Bottlenecks = OfVersions<Bottleneck>;

// Changes the rows of versions that have a bottleneck: y (n, d), and x what the half read.
void change_halves(const Pass& pass, const Bottlenecks& bottlenecks, int64_t d, const Rows& x, const Rows& y);

// A term of versions, in front of a layer, behind it or beside its weight.
enum class Role : int { input = 0, output = 1, add = 2 };
struct TermAt {
  Role role;
  TermKind kind;
  int64_t sizes[4];
  Place values, index;

  void apply(const Pass& pass, const char* block, int64_t n, const Rows& x, const Rows& y, const PanelMatrix& weight) const;
};

// The change that versions make at one layer.
struct LayerChange {
  Place in_scale, out_scale, wide_bias;
  Place bias;   // instead of the layer's, of the rows' dtype, for `whole`
  Place whole;  // panels instead of the layer's own
  std::vector<TermAt> terms;
  Pairs pairs;  // that read the mapped input

  bool maps_input() const {
    for (const TermAt& term : terms)
      if (term.role == Role::input) return true;
    return in_scale.at != 0;
  }
  void apply(Role role, const Pass& pass, const char* block, int64_t n, const Rows& x, const Rows& y, const PanelMatrix& weight) const {
    for (const TermAt& term : terms)
      if (term.role == role) term.apply(pass, block, n, x, y, weight);
  }
};

// The changes that versions make at the layers of a product. `pairs` are at all of them at once.
struct Change {
  Pairs pairs;
  std::vector<LayerChange> layers;  // empty where they add pairs and do nothing else
};

// What versions change at the products of a program whose blocks have one layout; null where they change nothing.
struct BlockLayout {
  std::vector<std::unique_ptr<const Change>> changes;  // by instruction
};

// Memory of all that a version changes at products.
struct Block {
  const BlockLayout* layout = nullptr;
  const char* data = nullptr;

  const Change* change(size_t instruction) const {
    return layout == nullptr || instruction >= layout->changes.size() ? nullptr : layout->changes[instruction].get();
  }
};

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

struct HeadsAt {  // of queries, keys or values: register, first value, values from head to head
  int source;
  int64_t first, apart;
};

// Queries, keys and values of a product: normed, turned, appended to the pages; then what the queries see. Where sequences can
// be shared out evenly, each thread takes its own through all of that: what it reads it has just written.
class AttentionInstruction final : public Instruction {
 public:
  struct Parts {
    int64_t layer, q_heads, kv_heads, head_dim, half;  // half: pairs that turn
    HeadsAt q, k, v;
    int table;  // of turns; -1: none
    bool interleaved;
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
  PagedCall call_of(const Pass& pass, const PagedRows& q) const;
  PagedRows heads(const Pass& pass, const HeadsAt& at) const;
  PagedRows normed(const Pass& pass, const NormParts& norm, const PagedRows& x, int64_t n_heads, char* memory) const;
  void turn(const Pass& pass, const PagedRows& x, int64_t n_heads) const;

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
