#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "core/parallel.h"
#include "step/step.h"

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

// `numbers`: the address of factors, the six of `middle_at`, ranks; or none.
Pairs pairs_at(const int64_t* numbers, const int64_t* end) {
  if (numbers == end) return {};
  return {pointer<char>(numbers[0]), {numbers + 7, end}, numbers[1] != 0, middle_at(numbers + 1)};
}

// The instructions of a program, and the memory that a pass through them takes. One pass at a time.
class StepProgram {
 public:
  // `turns`: of each rotation addresses of cosines and sines by position, how many there are of one, and positions.
  StepProgram(int dtype, Numbers turns) : dtype_(Dtype(dtype)), turns_(std::move(turns)) {}
  StepProgram(const StepProgram&) = delete;
  StepProgram& operator=(const StepProgram&) = delete;

  void add_embedding(int64_t table, int64_t n, int64_t d, const std::vector<float>& multipliers, int target) {
    add<EmbeddingInstruction>(pointer<void>(table), n, d, multipliers, target);
  }

  void add_norm(const NormNumbers& norm, int source, int target) { add<NormInstruction>(norm_of(norm), source, target); }

  // `layers`: of each the numbers that `layer_of` takes.
  void add_product(const std::vector<Numbers>& layers, int64_t joined, int64_t joined_bias, int source, int stream, int beside) {
    std::vector<Layer> found;
    for (const Numbers& l : layers) found.push_back(layer_of(l));
    auto made = std::make_unique<ProductInstruction>(std::move(found), pointer<void>(joined), pointer<void>(joined_bias), source, stream,
                                                     beside);
    if (last_product_ != nullptr) last_product_->precede(*made);
    last_product_ = made.get();
    products_.resize(instructions_.size() + 1);
    products_.back() = made.get();
    instructions_.push_back(std::move(made));
  }

  void add_head(const NormNumbers& norm, const Numbers& layer, int64_t output_bytes, int source, float scale) {
    add<HeadInstruction>(norm_of(norm), layer_of(layer), output_bytes, source, scale);
  }

  // `sizes`: layer, query heads, key heads, values of a head, pairs that turn. `places`: register, first value and values
  // from head to head, of queries, keys and values.
  void add_attention(const Numbers& sizes, const std::vector<Numbers>& places, const NormNumbers& q_norm, const NormNumbers& k_norm,
                     int table, bool interleaved, float scale, int64_t window, float softcap, int target) {
    const auto at = [&](size_t i) { return HeadsAt{static_cast<int>(places[i][0]), places[i][1], places[i][2]}; };
    add<AttentionInstruction>(AttentionInstruction::Parts{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], at(0), at(1), at(2), table,
                                                          interleaved, {scale, window, softcap}, target},
                              norm_of(q_norm), norm_of(k_norm));
  }

  void add_glu(int activation, int64_t d, int gate, int up, int64_t up_first, int target) {
    add<GluInstruction>(Activation(activation), d, gate, up, up_first, target);
  }

  void add_sum(int64_t d, float multiplier, int source, int stream) { add<AddInstruction>(d, multiplier, source, stream); }

  void add_change(int64_t d, int source, int target) { add<ChangeInstruction>(d, source, target); }

  void add_activation(int activation, int64_t d, int source, int target) { add<ActivationInstruction>(Activation(activation), d, source, target); }

  // `layers`: of each in_scale, out_scale and bias in float, bias, panels of a weight of its own, and pairs.
  void take(int64_t instruction, int64_t version, const Numbers& pairs, const std::vector<Numbers>& layers) {
    Change change{pairs_at(pairs.data(), pairs.data() + pairs.size()), {}};
    for (const Numbers& l : layers)
      change.layers.push_back({pointer<float>(l[0]), pointer<float>(l[1]), pointer<float>(l[2]), pointer<void>(l[3]), pointer<void>(l[4]),
                               pairs_at(l.data() + 5, l.data() + l.size())});
    products_[instruction]->take(version, std::move(change));
  }

  void take_bottleneck(int64_t instruction, int64_t version, const Numbers& pairs, bool reads_output) {
    instructions_[instruction]->take(version, Bottleneck{pairs_at(pairs.data(), pairs.data() + pairs.size()), reads_output});
  }

  void take_norm(int64_t instruction, int64_t version, const NormNumbers& norm) {
    instructions_[instruction]->take_norm(version, norm_of(norm));
  }

  void drop(int64_t version) {
    for (auto& instruction : instructions_) instruction->drop(version);
  }

  // Instructions [first, last). `registers`: address and stride of each; `store`: address, tokens of a page, layers, heads
  // and values of a head; `batch`: sequences, then addresses; `runs`: version, first row and the row behind the last, of each;
  // `given`: addresses of positions and of ids, how many rows are picked, addresses of these and of their tokens.
  void run(int64_t first, int64_t last, int64_t n, const Numbers& registers, const Numbers& store, const Numbers& batch,
           const Numbers& runs, const Numbers& given) {
    std::vector<Rows> rows;
    for (size_t i = 0; i < registers.size(); i += 2) rows.push_back(rows_at(registers[i], registers[i + 1]));
    const std::vector<TurnTable> tables = turns_at(pointer<int64_t>(given[0]), n);
    std::vector<VersionRun> versions;
    for (size_t i = 0; i < runs.size(); i += 3) versions.push_back({runs[i], runs[i + 1], runs[i + 2]});
    const PagedStore pages{const_cast<char*>(pointer<char>(store[0])), dtype_, store[1], store[2], store[3], store[4]};
    const PagedBatch sequences{batch[0], pointer<int64_t>(batch[1]), pointer<int64_t>(batch[2]), pointer<int64_t>(batch[3]),
                               pointer<int64_t>(batch[4])};
    const Pass pass{n, dtype_, rows.data(), pages, sequences, tables.data(), versions.data(), static_cast<int64_t>(versions.size()),
                    pointer<int64_t>(given[1]), pointer<int64_t>(given[3]), given[2], const_cast<int64_t*>(pointer<int64_t>(given[4])),
                    scratch_, rows_, threads_};
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

  template <class Kind, class... Parts>
  void add(Parts&&... parts) {
    instructions_.push_back(std::make_unique<Kind>(std::forward<Parts>(parts)...));
    products_.resize(instructions_.size());
  }

  Dtype dtype_;
  std::vector<std::unique_ptr<Instruction>> instructions_;
  std::vector<ProductInstruction*> products_;  // null where an instruction is none
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
      .def("add_activation", &StepProgram::add_activation)
      .def("add_change", &StepProgram::add_change)
      .def("add_sum", &StepProgram::add_sum)
      .def("take", &StepProgram::take)
      .def("take_bottleneck", &StepProgram::take_bottleneck)
      .def("take_norm", &StepProgram::take_norm)
      .def("drop", &StepProgram::drop)
      .def("seconds", &StepProgram::seconds)
      .def("run", &StepProgram::run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace veneer
