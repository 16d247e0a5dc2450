// The token of one row by its rule. Internal to kernels.cpp, for the reason that numeric.h gives.
#pragma once

#include "core/scratch.h"
#include "sample/cut.h"
#include "sample/sample.h"
#include "sample/shares.h"

namespace veneer {
namespace {

constexpr float never = -__builtin_inff(), largest_float = 3.40282347e+38f;
constexpr int64_t block = 64;  // logits, of which the largest is kept: most of a row need not be read again

// Some ids of a row in their order, with their logits and shares.
struct Some {
  int32_t* ids;
  float* logits;
  int64_t* shares;
  int64_t n;

  void keep(int64_t from) {  // next; `from` is behind it
    ids[n] = ids[from];
    logits[n] = logits[from];
    shares[n] = shares[from];
    ++n;
  }
  int64_t sum() const {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += shares[i];
    return total;
  }
};

// A row's logits in float, minus infinity behind the last, and what is found of them.
struct Row {
  int64_t d, n_blocks;
  float *logits, *tops;  // tops: the largest of each block
  int64_t* sums;         // of the shares of each block
  Some some;
  int32_t* keys;  // of `cut_of`
  int64_t* own;
  float top = never;

  Row(int64_t d_, char* memory) : d(d_), n_blocks((d_ + block - 1) / block) {
    Scratch scratch{memory};
    const int64_t n = n_blocks * block + width;  // `append` writes a register
    logits = scratch.take<float>(n);
    tops = scratch.take<float>(n_blocks);
    sums = scratch.take<int64_t>(n_blocks);
    some = {scratch.take<int32_t>(n), scratch.take<float>(n), scratch.take<int64_t>(n), 0};
    keys = scratch.take<int32_t>(n);
    own = scratch.take<int64_t>(n);
  }
  static int64_t bytes(int64_t d) {
    const int64_t n_blocks = (d + block - 1) / block;
    return (n_blocks * block + width) * 32 + n_blocks * 12 + 8 * 64;
  }

  void find_tops() {
    lanes best = splat(never);
    for (int64_t b = 0; b < n_blocks; ++b) {
      lanes most = splat(never);
      for (int64_t c = b * block; c < (b + 1) * block; c += width) most = larger(load(logits + c), most);
      tops[b] = largest(most);
      best = larger(most, best);
    }
    top = largest(best);
  }

  // False where one is no number, or the largest is infinite.
  template <class T>
  bool read(const T* from) {
    int_lanes odd{};
    each_register(d, [&](int64_t c, int64_t n) {
      const lanes x = take(from + c, n, never);
      odd |= x != x;
      store(logits + c, x);
    });
    for (int64_t c = (d + width - 1) / width * width; c < n_blocks * block; c += width) store(logits + c, splat(never));
    find_tops();
    for (int64_t i = 0; i < width; ++i)
      if (odd[i] != 0) return false;
    return top < __builtin_inff() && top > never;
  }

  int64_t likeliest() const {
    for (int64_t b = 0; b < n_blocks; ++b)
      if (tops[b] == top)
        for (int64_t c = b * block;; ++c)
          if (logits[c] == top) return c;
    return not_finite;
  }

  // Ids whose logit is `least` or more, without their shares. Ids behind the last have none.
  void gather(float least) {
    int_lanes counted;
    for (int64_t i = 0; i < width; ++i) counted[i] = static_cast<int32_t>(i);
    some.n = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
      if (!(tops[b] >= least)) continue;
      for (int64_t c = b * block; c < (b + 1) * block; c += width) {
        const int_lanes ids = counted + static_cast<int32_t>(c);
        const lanes x = load(logits + c);
        const int_lanes kept = (x >= least) & (ids < static_cast<int32_t>(d));
        append((int_lanes)x, kept, some.logits + some.n);
        some.n += append(ids, kept, some.ids + some.n);
      }
    }
  }

  // A logit that the n likeliest ids have, or more.
  float floor_of(int64_t n) {
    if (n >= n_blocks) return never;
    const int32_t key = cut_of(tops, nullptr, n_blocks, n, keys, own).key;
    return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
  }

  void share(const Distance& distance) {
    const int64_t n = up_to(some.n, width);
    for (int64_t i = some.n; i < n; ++i) some.logits[i] = never;
    put_shares(some.logits, n, distance, some.shares);
  }

  int64_t sum(const Distance& distance) {
    int64_t total = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
      const bool none = !(distance.of(tops[b]) > no_share_below);
      sums[b] = none ? 0 : sum_of_shares(logits + b * block, block, distance);
      total += sums[b];
    }
    return total;
  }

  // Of the ids that were gathered those with the n largest logits, and all that equal the last of them.
  void keep_largest(int64_t n) {
    if (n >= some.n) return;
    const int32_t least = cut_of(some.logits, nullptr, some.n, n, keys, own).key;
    const int64_t all = some.n;
    some.n = 0;
    for (int64_t i = 0; i < all; ++i)
      if (ordered(some.logits[i]) >= least) some.keep(i);
  }

  // Of the ids that were gathered the likeliest, as long as those before have less than `limit` together; the first of equal
  // ones comes first. `of_each`: an id counts 1, whatever its share.
  void keep_first(int64_t limit, bool of_each) {
    const Cut cut = cut_of(some.logits, of_each ? nullptr : some.shares, some.n, limit, keys, own);
    const int64_t all = some.n;
    int64_t before = cut.above;
    some.n = 0;
    for (int64_t i = 0; i < all; ++i) {
      const int32_t key = ordered(some.logits[i]);
      const bool equal = key == cut.key;
      if (key < cut.key || (equal && before >= limit)) continue;
      if (equal) before += of_each ? 1 : some.shares[i];
      some.keep(i);
    }
  }
};

inline bool has_changes(const RowRule& rule) {
  const bool counts = rule.n_counted > 0 && (rule.frequency != 0.0f || rule.presence != 0.0f);
  const bool repeats = rule.n_seen > 0 && rule.repetition != 1.0f;
  return rule.allowed[0] != nullptr || rule.allowed[1] != nullptr || rule.n_banned > 0 || rule.n_biased > 0 || repeats || counts;
}

inline void mask(const uint32_t* allowed, const Row& row) {
  bit_lanes bit;
  for (int64_t i = 0; i < width; ++i) bit[i] = 1u << i;
  for (int64_t c = 0; c < row.d; c += width) {
    const uint32_t word = allowed[c / 32] >> (c % 32);
    const lanes x = load(row.logits + c);
    store(row.logits + c, ((bit_lanes{} + word) & bit) != 0u ? x : splat(never));
  }
}

inline float penalized(float x, float rate) { return x == never ? x : x > 0.0f ? x / rate : x * rate; }

inline void change(const RowRule& rule, Row& row) {
  float* x = row.logits;
  for (const uint32_t* allowed : rule.allowed)
    if (allowed != nullptr) mask(allowed, row);
  for (int64_t i = 0; i < rule.n_banned; ++i) x[rule.banned[i]] = never;
  for (int64_t i = 0; i < rule.n_biased; ++i) x[rule.biased[i]] += rule.biases[i];
  for (int64_t i = 0; i < rule.n_seen; ++i) x[rule.seen[i]] = penalized(x[rule.seen[i]], rule.repetition);
  for (int64_t i = 0; i < rule.n_counted; ++i) {
    float& own = x[rule.counted[i]];
    own = own - rule.frequency * static_cast<float>(rule.counts[i]) - rule.presence;
  }
  for (int64_t c = 0; c < row.n_blocks * block; c += width) {  // a penalty near zero makes logits infinite
    const lanes some = load(x + c);
    store(x + c, some < largest_float ? some : splat(largest_float));
  }
  row.find_tops();
}

// The first 53 bits that Philox of ten rounds gives for a key and a place (numpy.random.Philox).
inline uint64_t random_bits(const uint64_t* key, uint64_t place) {
  constexpr uint64_t m0 = 0xD2E7470EE14C6C93u, m1 = 0xCA5A826395121157u, w0 = 0x9E3779B97F4A7C15u, w1 = 0xBB67AE8584CAA73Bu;
  uint64_t c[4] = {place + 1, 0, 0, 0}, k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round, k0 += w0, k1 += w1) {
    const unsigned __int128 a = static_cast<unsigned __int128>(m0) * c[0], b = static_cast<unsigned __int128>(m1) * c[2];
    const uint64_t first = static_cast<uint64_t>(b >> 64) ^ c[1] ^ k0, third = static_cast<uint64_t>(a >> 64) ^ c[3] ^ k1;
    c[0] = first, c[1] = static_cast<uint64_t>(b), c[2] = third, c[3] = static_cast<uint64_t>(a);
  }
  return c[0] >> 11;
}

inline int64_t up(double x) {
  const int64_t whole = static_cast<int64_t>(x);
  return static_cast<double>(whole) < x ? whole + 1 : whole;
}

// Gathers the ids that min_p, top_k and top_p leave; false where they are all.
inline bool narrow(const RowRule& rule, const Distance& distance, Row& row) {
  const bool counts = rule.top_k > 0 && rule.top_k < row.d;
  bool narrowed = true;
  if (rule.min_p > 0.0) {
    const int64_t least = up(rule.min_p * whole_share);
    const double depth = -__builtin_log(rule.min_p) + 0.01, near = __builtin_fabs(row.top) * 1e-6;  // some way beyond
    row.gather(static_cast<float>(row.top - depth / distance.rate - near));
    row.share(distance);
    const int64_t all = row.some.n;
    row.some.n = 0;
    for (int64_t i = 0; i < all; ++i)
      if (row.some.shares[i] >= least) row.some.keep(i);
  } else if (counts) {
    row.gather(row.floor_of(rule.top_k));
    row.share(distance);
  } else {
    narrowed = false;
  }
  if (counts) row.keep_largest(rule.top_k);
  if (!(rule.top_p < 1.0)) return narrowed;
  const int64_t limit = up(rule.top_p * static_cast<double>(narrowed ? row.some.sum() : row.sum(distance)));
  for (double depth = 2.5 - __builtin_log1p(-rule.top_p); !narrowed; depth *= 2.0) {  // few suffice for most rows
    const bool all = depth > -no_share_below;
    row.gather(all ? never : static_cast<float>(row.top - depth / distance.rate));
    row.share(distance);
    narrowed = all || row.some.sum() >= limit;
  }
  row.keep_first(limit, false);
  return true;
}

inline int64_t at_of(const RowRule& rule, int64_t sum) {  // below the sum
  return static_cast<int64_t>(static_cast<unsigned __int128>(random_bits(rule.key, rule.place)) * static_cast<uint64_t>(sum) >> 53);
}

inline int64_t drawn(const RowRule& rule, Row& row) {
  const Distance distance{row.top, static_cast<float>(1.0 / rule.temperature)};
  if (narrow(rule, distance, row)) {
    int64_t left = at_of(rule, row.some.sum()), i = 0;
    for (; left >= row.some.shares[i]; ++i) left -= row.some.shares[i];
    return row.some.ids[i];
  }
  int64_t left = at_of(rule, row.sum(distance)), b = 0, shares[block];
  for (; left >= row.sums[b]; ++b) left -= row.sums[b];
  put_shares(row.logits + b * block, block, distance, shares);
  int64_t i = 0;
  for (; left >= shares[i]; ++i) left -= shares[i];
  return b * block + i;
}

inline bool comes_first(const Some& some, int64_t a, int64_t b) {
  return some.logits[a] > some.logits[b] || (some.logits[a] == some.logits[b] && some.ids[a] < some.ids[b]);
}

inline void swap(Some& some, int64_t a, int64_t b) {
  const int32_t id = some.ids[a];
  const float logit = some.logits[a];
  some.ids[a] = some.ids[b], some.logits[a] = some.logits[b];
  some.ids[b] = id, some.logits[b] = logit;
}

// The likeliest first, of equal ones the first; a heap whose root comes last.
inline void sort(Some& some) {
  const auto sink = [&](int64_t at, int64_t n) {
    for (int64_t child = 2 * at + 1; child < n; at = child, child = 2 * at + 1) {
      if (child + 1 < n && comes_first(some, child, child + 1)) ++child;
      if (!comes_first(some, at, child)) return;
      swap(some, at, child);
    }
  };
  for (int64_t at = some.n / 2; at-- > 0;) sink(at, some.n);
  for (int64_t n = some.n; n-- > 1;) {
    swap(some, 0, n);
    sink(0, n);
  }
}

// Of the model's own logits: the log of their sum by e^, and the likeliest ids.
struct OwnLogits {
  float top;
  double log_sum;
  double logprob(float logit) const { return (static_cast<double>(logit) - top) - log_sum; }
};

inline OwnLogits own_logits(int64_t n_likeliest, Row& row, int64_t* ids, double* logprobs) {
  const OwnLogits own{row.top, __builtin_log(static_cast<double>(row.sum({row.top, 1.0f})) / whole_share)};
  if (n_likeliest > 0) {
    row.gather(row.floor_of(n_likeliest));
    if (n_likeliest < row.some.n) row.keep_first(n_likeliest, true);
    sort(row.some);
    for (int64_t i = 0; i < row.some.n; ++i) {
      ids[i] = row.some.ids[i];
      logprobs[i] = own.logprob(row.some.logits[i]);
    }
  }
  return own;
}

template <class T>
inline int64_t rank_of(const T* row, int64_t d, float own) {
  int64_t n = 0;
  int_lanes more{};  // minus the number of those in a lane
  each_register(d, [&](int64_t c, int64_t some) { more += take(row + c, some, never) >= own; });
  for (int64_t i = 0; i < width; ++i) n -= more[i];
  return own == never ? d : n;
}

template <class T>
void draw_row(const T* logits, int64_t d, const RowRule& rule, char* memory, int64_t r, int64_t first, const Draws& found) {
  Row row(d, memory);
  int64_t& token = found.tokens[r];
  if (!row.read(logits)) return static_cast<void>(token = not_finite);
  OwnLogits own{};
  if (rule.n_likeliest >= 0) own = own_logits(rule.n_likeliest, row, found.likeliest + first, found.likeliest_logprobs + first);
  token = rule.target;
  if (token < 0) {
    if (has_changes(rule)) change(rule, row);
    if (row.top == never) return static_cast<void>(token = none_allowed);
    token = rule.temperature == 0.0 ? row.likeliest() : drawn(rule, row);
  }
  if (rule.n_likeliest < 0) return;
  const float own_logit = to_float(logits[token]);
  found.logprobs[r] = own.logprob(own_logit);
  found.ranks[r] = rank_of(logits, d, own_logit);
}

}  // namespace
}  // namespace veneer
