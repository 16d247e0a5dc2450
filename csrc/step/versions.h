// What adapter versions change at the instructions of a program.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/panels.h"
#include "pairs/pairs.h"
#include "step/pass.h"
#include "terms/terms.h"

namespace veneer {

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
  bool has_middle = false, shares_a = false, scales_y = false;
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
      middles_.push_back({pairs.shares_a, pairs.scales_y, pairs.core.in<float>(block), pairs.bias.in<float>(block),
                          pairs.activation, pairs.out_scale.in<float>(block), pairs.out_bias.in<float>(block)});
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

}  // namespace veneer
