#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "core/parallel.h"
#include "step/instructions.h"

namespace nb = nanobind;

namespace veneer {
namespace {

using Numbers = std::vector<int64_t>;

template <class T>
const T* pointer(int64_t address) { return reinterpret_cast<const T*>(static_cast<uintptr_t>(address)); }

std::vector<float> floats_at(int64_t address, int64_t n) {
  const float* from = pointer<float>(address);
  return from == nullptr ? std::vector<float>() : std::vector<float>(from, from + n);
}

NormParts norm_of(bool subtracts_mean, float eps, int64_t d, int64_t weight, int64_t bias) {
  return {subtracts_mean, eps, floats_at(weight, d), floats_at(bias, d)};
}
using NormNumbers = std::tuple<bool, float, int64_t, int64_t, int64_t>;
NormParts norm_of(const NormNumbers& given) { return std::apply([](auto... x) { return norm_of(x...); }, given); }

// Of what lies at an address, in a block that starts at another one; 0: there is none.
Place place(int64_t address, int64_t start) { return {address == 0 ? 0 : address - start}; }

// `numbers`: the address of factors, the six of `middle_at`, ranks; or none. `start` is the address of their block.
Pairs pairs_at(const int64_t* numbers, const int64_t* end, int64_t start = 0) {
  if (numbers == end) return {};
  const auto at = [&](int i) { return place(numbers[i], start); };
  const PairsMiddle middle = middle_at(numbers + 1);
  return {at(0), {numbers + 7, end}, numbers[1] != 0, middle.shares_a, middle.scales_y, middle.activation, at(2), at(3), at(5), at(6)};
}

// Of each term its role, kind, four sizes, and addresses of values and index.
constexpr int term_numbers = 8;
std::vector<TermAt> terms_at(const int64_t* numbers, const int64_t* end, int64_t start) {
  std::vector<TermAt> found;
  for (const int64_t* t = numbers; t < end; t += term_numbers)
    found.push_back({Role(t[0]), TermKind(t[1]), {t[2], t[3], t[4], t[5]}, place(t[6], start), place(t[7], start)});
  return found;
}

// The instructions of a program, and the memory that a pass through them takes. One pass at a time.
class StepProgram {
 public:
  // `turns`: of each rotation addresses of cosines and sines by position, how many there are of one, and positions.
  StepProgram(int dtype, Numbers turns) : dtype_(Dtype(dtype)), turns_(std::move(turns)) {}
  StepProgram(const StepProgram&) = delete;
  StepProgram& operator=(const StepProgram&) = delete;

  // An instruction of plain parts, in the order of its constructor, is bound by a line that names their types.
  template <class Kind, class... Parts>
  void add(Parts... parts) {
    instructions_.push_back(std::make_unique<Kind>(std::move(parts)...));
  }

  void add_embedding(int64_t table, int64_t n, int64_t d, const std::vector<float>& multipliers, int target) {
    add<EmbeddingInstruction>(pointer<void>(table), n, d, multipliers, target);
  }

  void add_norm(const NormNumbers& norm, int source, int target) { add<NormInstruction>(norm_of(norm), source, target); }

  // `layers`: of each the numbers that `layer_of` takes.
  void add_product(const std::vector<Numbers>& layers, int64_t joined, int64_t joined_bias, int source, int stream, int beside) {
    std::vector<Layer> found;
    for (const Numbers& l : layers) found.push_back(layer_of(l));
    auto made = std::make_unique<ProductInstruction>(instructions_.size(), std::move(found), pointer<void>(joined),
                                                     pointer<void>(joined_bias), source, stream, beside);
    if (last_product_ != nullptr) last_product_->precede(*made);
    last_product_ = made.get();
    instructions_.push_back(std::move(made));
  }

  void add_head(const NormNumbers& norm, const Numbers& layer, int64_t output_bytes, int source, float scale) {
    add<HeadInstruction>(norm_of(norm), layer_of(layer), output_bytes, source, scale);
  }

  // `sizes`: layer, query heads, key heads, values of a head, pairs that turn. `places`: the numbers of `HeadsAt`, of queries,
  // keys and values. `bias`, `sinks`: those of `PagedOptions`.
  void add_attention(const Numbers& sizes, const std::vector<Numbers>& places, const NormNumbers& q_norm, const NormNumbers& k_norm,
                     int table, bool interleaved, bool norms_last, float scale, int64_t window, float softcap, int64_t bias, int64_t positions, int64_t sinks,
                     int target) {
    const auto at = [&](size_t i) { return HeadsAt{static_cast<int>(places[i][0]), places[i][1], places[i][2], places[i][3]}; };
    add<AttentionInstruction>(AttentionInstruction::Parts{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], at(0), at(1), at(2), table,
                                                          interleaved, norms_last, {scale, window, softcap, pointer<float>(bias), positions, pointer<float>(sinks)},
                                                          target},
                              norm_of(q_norm), norm_of(k_norm));
  }

  void add_glu(int activation, int64_t d, int gate, int up, int64_t up_first, int target) {
    add<GluInstruction>(Activation(activation), d, gate, up, up_first, target);
  }

  // `weight`: a row for each token that is seen, the latest first; `bias`: 0 for none.
  void add_conv(int64_t d, int64_t kernel, int64_t layer, int64_t weight, int64_t bias, int source, int target) {
    add<ConvInstruction>(d, kernel, layer, pointer<float>(weight), pointer<float>(bias), source, target);
  }

  // `sizes`: key heads, value heads, their widths, the kernel's length; `weights`: addresses of the kernel, its bias (0: none), the
  // norm, rates and biases; `parts`: register, first value and values from head to head of q, k, v, z, b and a.
  void add_delta(const Numbers& sizes, float eps, float beta_scale, const Numbers& weights, int64_t layer,
                 const std::vector<Numbers>& parts, int target) {
    const auto weight = [&](size_t i) { return pointer<float>(weights[i]); };
    std::vector<DeltaInstruction::Part> places;
    for (const Numbers& part : parts) places.push_back({static_cast<int>(part[0]), part[1], part[2]});
    add<DeltaInstruction>(DeltaSizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], dtype_, eps, beta_scale},
                          DeltaWeights{weight(0), weight(1), weight(2), weight(3), weight(4)}, layer, std::move(places), target);
  }

  void add_activation(int activation, int64_t d, int source, int target) { add<ActivationInstruction>(Activation(activation), d, source, target); }

  // `router`: experts, how many are chosen, whether by sigmoids, whether normalized, groups and those kept. `at`: registers of
  // scores, source, shared, its gate (-1: none) and target.
  void add_experts(const Numbers& router, float scale, int64_t bias, const Numbers& inner, const Numbers& down, int activation,
                   const Numbers& at) {
    const auto number = [&](size_t i) { return static_cast<int>(at[i]); };
    add<ExpertsInstruction>(instructions_.size(), Router{router[0], router[1], router[2] != 0, router[3] != 0, router[4], router[5], scale, pointer<float>(bias)},
                            Mixture{router[0], router[1], stack_at(dtype_, inner), stack_at(dtype_, down), Activation(activation)},
                            ExpertsInstruction::At{number(0), number(1), number(2), number(3), number(4)});
  }

  // What versions change at products, as one of them does whose block is at `start`: of each change its instruction, pairs, and of
  // each layer the addresses of in_scale, out_scale and bias in float, bias, panels of a weight of its own, how many terms there
  // are, terms and pairs.
  void add_layout(size_t layout, int64_t start, const std::vector<std::tuple<size_t, Numbers, std::vector<Numbers>>>& changes) {
    auto made = std::make_unique<BlockLayout>();
    made->changes.resize(instructions_.size());
    for (const auto& [instruction, pairs, layers] : changes) {
      auto change = std::make_unique<Change>();
      change->pairs = pairs_at(pairs.data(), pairs.data() + pairs.size(), start);
      for (const Numbers& l : layers) {
        const auto at = [&](int i) { return place(l[i], start); };
        const int64_t *terms = l.data() + 6, *pairs = terms + term_numbers * l[5];
        change->layers.push_back({at(0), at(1), at(2), at(3), at(4), terms_at(terms, pairs, start), pairs_at(pairs, l.data() + l.size(), start)});
      }
      made->changes.at(instruction) = std::move(change);
    }
    if (layout >= layouts_.size()) layouts_.resize(layout + 1);
    layouts_[layout] = std::move(made);
  }

  void drop_layout(size_t layout) { layouts_.at(layout).reset(); }

  void take(size_t version, size_t layout, int64_t block) {
    if (version >= blocks_.size()) blocks_.resize(version + 1);
    blocks_[version] = {layouts_.at(layout).get(), pointer<char>(block)};
  }

  void take_bottleneck(int64_t instruction, int64_t version, const Numbers& pairs, bool reads_output) {
    instructions_[instruction]->take(version, Bottleneck{pairs_at(pairs.data(), pairs.data() + pairs.size()), reads_output});
  }

  void take_norm(int64_t instruction, int64_t version, const NormNumbers& norm) {
    instructions_[instruction]->take_norm(version, norm_of(norm));
  }

  void drop(size_t version) {
    if (version < blocks_.size()) blocks_[version] = {};
    for (auto& instruction : instructions_) instruction->drop(version);
  }

  // Instructions [first, last). `registers`: address and stride of each; `store`: address, tokens of a page, layers, heads,
  // values of a head, address and layers of short convolutions, and those of states; `batch`: sequences, then addresses; `runs`: version, first row and the row behind the last, of each;
  // `given`: addresses of positions and of ids, how many rows are picked, addresses of these and of their tokens.
  void run(int64_t first, int64_t last, int64_t n, const Numbers& registers, const Numbers& store, const Numbers& batch,
           const Numbers& runs, const Numbers& given) {
    std::vector<Rows> rows;
    for (size_t i = 0; i < registers.size(); i += 2) rows.push_back(rows_at(registers[i], registers[i + 1]));
    const std::vector<TurnTable> tables = turns_at(pointer<int64_t>(given[0]), n);
    std::vector<VersionRun> versions;
    for (size_t i = 0; i < runs.size(); i += 3) {
      if (static_cast<size_t>(runs[i]) >= blocks_.size()) throw std::out_of_range("a version that was not taken in");
      versions.push_back({runs[i], runs[i + 1], runs[i + 2]});
    }
    const PagedStore pages{const_cast<char*>(pointer<char>(store[0])), dtype_, store[1], store[2], store[3], store[4]};
    const PagedBatch sequences{batch[0], pointer<int64_t>(batch[1]), pointer<int64_t>(batch[2]), pointer<int64_t>(batch[3]),
                               pointer<int64_t>(batch[4])};
    const Pass pass{n, dtype_, rows.data(), pages, sequences, tables.data(), versions.data(), static_cast<int64_t>(versions.size()),
                    blocks_.data(), pointer<int64_t>(given[1]), pointer<int64_t>(given[3]), given[2], const_cast<int64_t*>(pointer<int64_t>(given[4])),
                    scratch_, rows_, threads_, const_cast<char*>(pointer<char>(store[5])), store[6],
                    const_cast<float*>(pointer<float>(store[7])), store[8]};
    seconds_.resize(instructions_.size());
    with_standing_team([&] {
      for (int64_t i = first; i < last; ++i) {
        const auto start = std::chrono::steady_clock::now();
        instructions_[i]->run(pass);
        seconds_[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
    });
  }

  // That each instruction has taken since they were asked for last.
  std::vector<double> seconds() { return std::exchange(seconds_, {}); }

 private:
  std::vector<TurnTable> turns_at(const int64_t* positions, int64_t n) {
    int64_t values = 0;
    for (size_t i = 0; i < turns_.size(); i += 4) {
      values += 2 * n * turns_[i + 2];
      for (int64_t r = 0; r < n; ++r)
        if (positions[r] < 0 || positions[r] >= turns_[i + 3]) throw std::out_of_range("a position is beyond those of the program");
    }
    float* to = reinterpret_cast<float*>(turned_.at_least(values * static_cast<int64_t>(sizeof(float))));
    const auto rows_of = [&](int64_t table, int64_t half) {
      const float* start = to;
      for (int64_t r = 0; r < n; ++r, to += half) std::memcpy(to, pointer<float>(table) + positions[r] * half, half * sizeof(float));
      return start;
    };
    std::vector<TurnTable> found;
    for (size_t i = 0; i < turns_.size(); i += 4) {
      const float* cos = rows_of(turns_[i], turns_[i + 2]);
      found.push_back({cos, rows_of(turns_[i + 1], turns_[i + 2])});
    }
    return found;
  }

  // From o, i, depth, panels, bias, the same in float, the register that it writes, coding and unit.
  Layer layer_of(const Numbers& l) const {
    return {{l[0], l[1], l[2], dtype_, const_cast<void*>(pointer<void>(l[3])), Coding(l[7]), l[8]}, pointer<void>(l[4]),
            floats_at(l[5], l[0]), static_cast<int>(l[6])};
  }

  Dtype dtype_;
  std::vector<std::unique_ptr<Instruction>> instructions_;
  std::vector<std::unique_ptr<const BlockLayout>> layouts_;  // by number, as the blocks of versions are
  std::vector<Block> blocks_;
  ProductInstruction* last_product_ = nullptr;
  std::vector<double> seconds_;
  Numbers turns_;
  Memory scratch_, rows_, turned_;
  ThreadMemory threads_;
};

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<StepProgram>(m, "StepProgram")
      .def(nb::init<int, Numbers>(), nb::arg("dtype"), nb::arg("turns"))
      .def("add_embedding", &StepProgram::add_embedding)
      .def("add_norm", &StepProgram::add_norm)
      .def("add_product", &StepProgram::add_product)
      .def("add_attention", &StepProgram::add_attention)
      .def("add_head", &StepProgram::add_head)
      .def("add_glu", &StepProgram::add_glu)
      .def("add_conv", &StepProgram::add_conv)
      .def("add_delta", &StepProgram::add_delta)
      .def("add_activation", &StepProgram::add_activation)
      .def("add_experts", &StepProgram::add_experts)
      .def("add_change", &StepProgram::add<ChangeInstruction, int64_t, int, int>)
      .def("add_sum", &StepProgram::add<AddInstruction, int64_t, float, int, int>)
      .def("add_layout", &StepProgram::add_layout)
      .def("drop_layout", &StepProgram::drop_layout)
      .def("take", &StepProgram::take)
      .def("take_bottleneck", &StepProgram::take_bottleneck)
      .def("take_norm", &StepProgram::take_norm)
      .def("drop", &StepProgram::drop)
      .def("seconds", &StepProgram::seconds)
      .def("run", &StepProgram::run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
