// Attention over blocks on a CPU, forward and backward (Dao 2023, FlashAttention-2).
//
// All seven products are oneDNN's, of blocks that lie in the cache: of bfloat16 at the rate of the
// CPU's bfloat16 units, which aten's own kernel does not use in backward, nor in forward without
// AMX. Scores, their gradients and every sum are float32; weights are rounded to the inputs' type
// before they multiply, as aten's are.
//
// Backward makes the scores transposed, keys x queries: as it writes them, they are the left factor
// of dv and dk, and lse runs along their rows.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <string>
#include <type_traits>

namespace {

using c10::BFloat16;
using Index = int64_t;

// [B, H, S, K] of which a row is dense; strides in elements.
struct View {
  void* data;
  Index batch, head, row;

  template <class T>
  T* at(Index b, Index h, Index s) const {
    return static_cast<T*>(data) + b * batch + h * head + s * row;
  }
};

struct Sizes {
  Index batch, heads, key_heads, queries, keys, width, causal;

  Index group() const { return heads / key_heads; }
  float scale() const { return 1.f / std::sqrt(static_cast<float>(width)); }
};

// Queries and keys of a block: the fastest of those tried on Zen 4, 32 to 512 and 32 to 1024.
constexpr Index kForwardQueries = 64, kForwardKeys = 512;
constexpr Index kBackwardQueries = 64, kBackwardKeys = 64;

template <class T>
struct Buffer {
  explicit Buffer(Index size)
      : data(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data; }

  T* const data;
};

Index blocks(Index size, Index block) { return (size + block - 1) / block; }
Index even(Index size) { return (size + 1) / 2 * 2; }

// The units want the right factor of a bfloat16 product with two rows side by side: numbers
// (2 r, c) and (2 r + 1, c) are neighbours, and an odd last row has zeros beside it.
template <class T>
constexpr bool kPaired = std::is_same_v<T, BFloat16>;

// A thread's use of the units, given back when it ends (of AMX, its tiles).
template <class T>
struct Units {
  Units() = default;
  ~Units() { at::native::cpublas::brgemm_release(kPaired<T>); }
  Units(const Units&) = delete;
  Units& operator=(const Units&) = delete;
};

// c [m, n] = (add ? c : 0) + a [m, k] b [k, n]; behind an odd k, a has a column of zeros.
template <class T>
void multiply(Index m, Index n, Index k, const T* a, Index lda, const T* b, Index ldb, float* c,
              Index ldc, bool add) {
  const Index depth = kPaired<T> ? even(k) : k;
  at::native::cpublas::brgemm(m, n, depth, lda, ldb, ldc, add, a, b, c, kPaired<T>);
}

// Make the right factor x^T [width, rows] of x [rows, width]; width is even.
template <class T>
void pack_across(const T* x, Index stride, Index rows, Index width, T* to, Index ld) {
  for (Index r = 0; r < rows; ++r) {
    if constexpr (kPaired<T>) {
      for (Index w = 0; w < width / 2; ++w)
        std::memcpy(to + (w * ld + r) * 2, x + r * stride + w * 2, 4);
    } else {
      for (Index w = 0; w < width; ++w) to[w * ld + r] = x[r * stride + w];
    }
  }
}

// Make the right factor x [rows, width] of x.
template <class T>
void pack_along(const T* x, Index stride, Index rows, Index width, T* to) {
  if constexpr (kPaired<T>) {
    for (Index r = 0; r < rows; r += 2) {
      const T* row = x + r * stride;
      T* line = to + r * width;
      const bool last = r + 1 == rows;
      for (Index w = 0; w < width; ++w) {
        line[2 * w] = row[w];
        line[2 * w + 1] = last ? T(0.f) : row[stride + w];
      }
    }
  } else {
    for (Index r = 0; r < rows; ++r) std::memcpy(to + r * width, x + r * stride, width * sizeof(T));
  }
}

// e^x to 1e-7 (Cephes' polynomial), in operations that a compiler makes vectors of: 0 below -87.7,
// infinite above 88.3, and NaN of NaN.
inline float exponential(float x) {
  const float y = std::min(std::max(x, -88.f), 89.f);
  const float n = std::nearbyint(y * 1.44269504f);
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;  // of 2^n
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// A weight as it is stored: bfloat16's bits, rounded to even, or the float itself.
template <class T>
using Stored = std::conditional_t<kPaired<T>, uint16_t, float>;

template <class T>
inline Stored<T> stored(float x) {
  if constexpr (kPaired<T>) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  } else {
    return x;
  }
}

template <class T>
class Forward {
 public:
  Forward(View q, View k, View v, View out, float* lse, Sizes z)
      : q_(q), k_(k), v_(v), out_(out), lse_(lse), z_(z),
        wide_(std::min(kForwardKeys, even(z.keys))), key_blocks_(blocks(z.keys, wide_)),
        keys_(z.batch * z.key_heads * key_blocks_ * block()),
        values_(z.batch * z.key_heads * key_blocks_ * block()) {}

  void run() {
    at::parallel_for(0, z_.batch * z_.key_heads * key_blocks_, 1, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) pack(i / key_blocks_, i % key_blocks_, i);
    });
    const Index query_blocks = blocks(z_.queries, kForwardQueries);
    at::parallel_for(0, z_.batch * z_.heads * query_blocks, 1, [&](Index begin, Index end) {
      const Units<T> units;
      Scratch s(wide_, z_.width);
      for (Index i = begin; i < end; ++i) attend(i / query_blocks, i % query_blocks, s);
    });
  }

 private:
  struct Scratch {
    Scratch(Index wide, Index width)
        : scores(kForwardQueries * wide), weights(kForwardQueries * wide),
          sums(kForwardQueries * width), top(kForwardQueries), total(kForwardQueries) {}
    Buffer<float> scores;
    Buffer<T> weights;
    Buffer<float> sums, top, total;
  };

  Index block() const { return wide_ * z_.width; }

  void pack(Index head, Index number, Index to) {
    const Index b = head / z_.key_heads, h = head % z_.key_heads, first = number * wide_;
    const Index n = std::min(wide_, z_.keys - first);
    pack_across(k_.at<T>(b, h, first), k_.row, n, z_.width, keys_ + to * block(), wide_);
    pack_along(v_.at<T>(b, h, first), v_.row, n, z_.width, values_ + to * block());
  }

  // Write out and lse of a block of queries.
  void attend(Index head, Index number, const Scratch& s) {
    const Index b = head / z_.heads, h = head % z_.heads, first = number * kForwardQueries;
    const Index m = std::min(kForwardQueries, z_.queries - first), width = z_.width;
    const Index read = z_.causal ? std::min(z_.keys, first + m) : z_.keys;
    const Index key_head = b * z_.key_heads + h / z_.group();
    std::fill_n(s.top.data, m, -std::numeric_limits<float>::infinity());
    std::fill_n(s.total.data, m, 0.f);
    for (Index start = 0; start < read; start += wide_) {
      const Index n = std::min(wide_, read - start);
      const Index at = (key_head * key_blocks_ + start / wide_) * block();
      multiply<T>(m, n, width, q_.at<T>(b, h, first), q_.row, keys_ + at, wide_, s.scores, wide_,
                  false);
      for (Index r = 0; r < m; ++r) {
        const Index seen = z_.causal ? std::clamp<Index>(first + r + 1 - start, 0, n) : n;
        const float keep = weigh(r, seen, n, s);
        float* sum = s.sums + r * width;
        for (Index w = 0; start > 0 && w < width; ++w) sum[w] *= keep;
      }
      multiply<T>(m, width, n, s.weights, wide_, values_ + at, width, s.sums, width, start > 0);
    }
    for (Index r = 0; r < m; ++r) {
      T* row = out_.at<T>(b, h, first + r);
      const float share = 1.f / s.total[r];
      for (Index w = 0; w < width; ++w) row[w] = static_cast<T>(s.sums[r * width + w] * share);
      lse_[(b * z_.heads + h) * z_.queries + first + r] = s.top[r] + std::log(s.total[r]);
    }
  }

  // Make weights of a row's first `seen` scores, zeros to n; return what its sums so far shrink by.
  float weigh(Index r, Index seen, Index n, const Scratch& s) const {
    const float* row = s.scores + r * wide_;
    auto* weight = reinterpret_cast<Stored<T>*>(s.weights + r * wide_);
    const float scale = z_.scale();
    float high = -std::numeric_limits<float>::infinity(), sum = 0.f;
#pragma omp simd reduction(max : high)
    for (Index c = 0; c < seen; ++c) high = std::max(high, row[c]);
    high = std::max(s.top[r], high * scale);
#pragma omp simd reduction(+ : sum)
    for (Index c = 0; c < seen; ++c) {
      const float p = exponential(row[c] * scale - high);
      weight[c] = stored<T>(p);
      sum += p;
    }
    std::fill(weight + seen, weight + even(n), Stored<T>(0));
    const float keep = exponential(s.top[r] - high);
    s.total[r] = s.total[r] * keep + sum;
    s.top[r] = high;
    return keep;
  }

  const View q_, k_, v_, out_;
  float* const lse_;
  const Sizes z_;
  const Index wide_, key_blocks_;  // keys in a block, and blocks
  Buffer<T> keys_, values_;
};

struct Gradients {
  View dq, dk, dv;
};

// All of one key head and of the query heads that read it, one thread's work.
template <class T>
class Backward {
 public:
  Backward(View dout, View q, View k, View v, View out, const float* lse, Gradients to, Sizes z)
      : dout_(dout), q_(q), k_(k), v_(v), out_(out), lse_(lse), to_(to), z_(z),
        q_across_(rows() * z.width), q_along_(rows() * z.width), d_across_(rows() * z.width),
        d_along_(rows() * z.width), share_(rows()), dq_across_(rows() * z.width),
        k_across_(kBackwardKeys * z.width), dk_(kBackwardKeys * z.width),
        dv_(kBackwardKeys * z.width), scores_(kPair), slopes_(kPair), weights_(kPair),
        steps_(kPair), steps_along_(kPair), dk_all_(z.keys * z.width), dv_all_(z.keys * z.width) {}

  void run(Index b, Index key_head) {
    std::fill_n(dk_all_.data, z_.keys * z_.width, 0.f);
    std::fill_n(dv_all_.data, z_.keys * z_.width, 0.f);
    for (Index g = 0; g < z_.group(); ++g) {
      const Index h = key_head * z_.group() + g;
      read_queries(b, h);
      for (Index start = 0; start < z_.keys; start += kBackwardKeys)
        visit_keys(b, h, key_head, start);
      write_queries(b, h);
    }
    for (Index c = 0; c < z_.keys; ++c) {
      T *dk = to_.dk.at<T>(b, key_head, c), *dv = to_.dv.at<T>(b, key_head, c);
      for (Index w = 0; w < z_.width; ++w) {
        dk[w] = static_cast<T>(dk_all_[c * z_.width + w]);
        dv[w] = static_cast<T>(dv_all_[c * z_.width + w]);
      }
    }
  }

 private:
  static constexpr Index kPair = kBackwardQueries * kBackwardKeys;

  Index rows() const { return blocks(z_.queries, kBackwardQueries) * kBackwardQueries; }

  void read_queries(Index b, Index h) {
    const Index width = z_.width;
    for (Index first = 0; first < z_.queries; first += kBackwardQueries) {
      const Index m = std::min(kBackwardQueries, z_.queries - first), to = first * width;
      const T *q = q_.at<T>(b, h, first), *d = dout_.at<T>(b, h, first);
      pack_across(q, q_.row, m, width, q_across_ + to, kBackwardQueries);
      pack_along(q, q_.row, m, width, q_along_ + to);
      pack_across(d, dout_.row, m, width, d_across_ + to, kBackwardQueries);
      pack_along(d, dout_.row, m, width, d_along_ + to);
      for (Index r = 0; r < m; ++r) {
        const T* o = out_.at<T>(b, h, first + r);
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (Index w = 0; w < width; ++w) {
          sum += static_cast<float>(d[r * dout_.row + w]) * static_cast<float>(o[w]);
        }
        share_[first + r] = sum;
      }
    }
    std::fill_n(dq_across_.data, rows() * width, 0.f);
  }

  void write_queries(Index b, Index h) {
    for (Index s = 0; s < z_.queries; ++s) {
      const Index first = s / kBackwardQueries * kBackwardQueries;
      const float* from = dq_across_ + first * z_.width + s - first;
      T* row = to_.dq.at<T>(b, h, s);
      for (Index w = 0; w < z_.width; ++w) row[w] = static_cast<T>(from[w * kBackwardQueries]);
    }
  }

  // Add what one head's queries say to a block of keys, and the block to dq.
  void visit_keys(Index b, Index h, Index key_head, Index start) {
    const Index n = std::min(kBackwardKeys, z_.keys - start), width = z_.width;
    const T *k = k_.at<T>(b, key_head, start), *v = v_.at<T>(b, key_head, start);
    for (Index w = 0; w < width; ++w) {
      T* column = k_across_ + w * kBackwardKeys;
      for (Index c = 0; c < n; ++c) column[c] = k[c * k_.row + w];
      if (n % 2) column[n] = T(0.f);
    }
    bool add = false;
    const Index from = z_.causal ? start / kBackwardQueries * kBackwardQueries : 0;
    for (Index first = from; first < z_.queries; first += kBackwardQueries, add = true) {
      const Index m = std::min(kBackwardQueries, z_.queries - first), at = first * width;
      const Index ld = kBackwardQueries;
      multiply<T>(n, m, width, k, k_.row, q_across_ + at, ld, scores_, ld, false);
      multiply<T>(n, m, width, v, v_.row, d_across_ + at, ld, slopes_, ld, false);
      weigh(lse_ + (b * z_.heads + h) * z_.queries + first, share_ + first, start - first, n, m);
      multiply<T>(n, width, m, weights_, ld, d_along_ + at, width, dv_, width, add);
      multiply<T>(n, width, m, steps_, ld, q_along_ + at, width, dk_, width, add);
      pack_along<T>(steps_, ld, n, ld, steps_along_);
      multiply<T>(width, m, n, k_across_, kBackwardKeys, steps_along_, ld, dq_across_ + at, ld,
                  true);
    }
    if (!add) return;  // no query reads so far
    float *dk = dk_all_ + start * width, *dv = dv_all_ + start * width;
    for (Index i = 0; i < n * width; ++i) {
      dk[i] += dk_[i];
      dv[i] += dv_[i];
    }
  }

  // Make weights p and steps p (dp - share) / sqrt(K); the first `behind` + c queries do not see
  // key c.
  void weigh(const float* lse, const float* share, Index behind, Index n, Index m) {
    const float scale = z_.scale();
    for (Index c = 0; c < n; ++c) {
      const Index at = c * kBackwardQueries;
      const float *score = scores_ + at, *slope = slopes_ + at;
      auto* weight = reinterpret_cast<Stored<T>*>(weights_ + at);
      auto* step = reinterpret_cast<Stored<T>*>(steps_ + at);
      const Index hidden = z_.causal ? std::clamp<Index>(behind + c, 0, m) : 0;
      std::fill_n(weight, hidden, Stored<T>(0));
      std::fill_n(step, hidden, Stored<T>(0));
#pragma omp simd
      for (Index r = hidden; r < m; ++r) {
        const float p = exponential(score[r] * scale - lse[r]);
        weight[r] = stored<T>(p);
        step[r] = stored<T>(p * (slope[r] - share[r]) * scale);
      }
      if (m % 2) weight[m] = step[m] = 0;
    }
  }

  const View dout_, q_, k_, v_, out_;
  const float* const lse_;
  const Gradients to_;
  const Sizes z_;
  Buffer<T> q_across_, q_along_, d_across_, d_along_;
  Buffer<float> share_, dq_across_;
  Buffer<T> k_across_;
  Buffer<float> dk_, dv_, scores_, slopes_;
  Buffer<T> weights_, steps_, steps_along_;
  Buffer<float> dk_all_, dv_all_;
};

template <class T>
void backward(View dout, View q, View k, View v, View out, const float* lse, Gradients to,
              Sizes z) {
  at::parallel_for(0, z.batch * z.key_heads, 1, [&](Index begin, Index end) {
    const Units<T> units;
    Backward<T> work(dout, q, k, v, out, lse, to, z);
    for (Index i = begin; i < end; ++i) work.run(i / z.key_heads, i % z.key_heads);
  });
}

// Run it; return what went wrong, or null.
template <class F>
const char* attempt(F run) {
  static thread_local std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  } catch (...) {
    return "an error that is no std::exception";
  }
}

}  // namespace

// half: the tensors are bfloat16; float32 otherwise. lse [B, H, Sq] is dense.
extern "C" {

const char* attention_forward(int half, View q, View k, View v, View out, float* lse, Sizes z) {
  return attempt([&] {
    half ? Forward<BFloat16>(q, k, v, out, lse, z).run()
         : Forward<float>(q, k, v, out, lse, z).run();
  });
}

const char* attention_backward(int half, View dout, View q, View k, View v, View out,
                               const float* lse, View dq, View dk, View dv, Sizes z) {
  return attempt([&] {
    const auto run = half ? backward<BFloat16> : backward<float>;
    run(dout, q, k, v, out, lse, {dq, dk, dv}, z);
  });
}
}
