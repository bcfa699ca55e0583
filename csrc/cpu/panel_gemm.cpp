// Register-blocked products with panels of weights (see panel_gemm.h). CMake compiles this file
// once per instruction set with C2C_ISA naming it; only the tables at the end have external
// linkage.
#include "panel_gemm.h"

#include <cstring>

#include "../scalar_math.h"
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef C2C_ISA
#error "C2C_ISA must name the instruction set this file is compiled for"
#endif
#define C2C_JOIN_(a, b) a##b
#define C2C_JOIN(a, b) C2C_JOIN_(a, b)

namespace c2c::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

constexpr int64_t kDepthPart = 32;  // inputs of one running sum; even
constexpr int64_t kLineBytes = 64;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  static constexpr int kPerPanel = kPanel / kLanes;
};
template <class T>
using Vec = typename Vector<T>::type;

template <class V, class T>
V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// The 16 weights of one panel for one input (for `pair` inputs), as vectors of T.
template <class T, class W>
struct PanelRow {  // T itself
  static constexpr int kPair = 1;
  Vec<T> v[1][Vector<T>::kPerPanel];
  explicit PanelRow(const W* w) {
    for (int i = 0; i < Vector<T>::kPerPanel; ++i) {
      v[0][i] = load<Vec<T>>(w + i * Vector<T>::kLanes);
    }
  }
};

template <>
struct PanelRow<float, Bfloat16> {
  static constexpr int kPair = 2;
  Vec<float> v[2][Vector<float>::kPerPanel];
  explicit PanelRow(const Bfloat16* w) {
    for (int i = 0; i < Vector<float>::kPerPanel; ++i) {
      // The pair's first element is the low half of each 32 bits.
      const auto both = load<Vec<uint32_t>>(w + 2 * i * Vector<float>::kLanes);
      const Vec<uint32_t> first = both << 16, second = both & 0xffff0000u;
      std::memcpy(&v[0][i], &first, sizeof first);
      std::memcpy(&v[1][i], &second, sizeof second);
    }
  }
};

template <>
struct PanelRow<float, Float16> {
  static constexpr int kPair = 1;
  Vec<float> v[1][Vector<float>::kPerPanel];
  explicit PanelRow(const Float16* w) {
    for (int i = 0; i < Vector<float>::kPerPanel; ++i, w += Vector<float>::kLanes) {
#if defined(__AVX512F__)
      const __m512 wide = _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(w));
#elif defined(__F16C__)
      const __m256 wide = _mm256_cvtph_ps(load<__m128i>(w));
#else
      float wide[Vector<float>::kLanes];
      for (int lane = 0; lane < Vector<float>::kLanes; ++lane) wide[lane] = widen(w[lane]);
#endif
      std::memcpy(&v[0][i], &wide, sizeof wide);
    }
  }
};

// Fetches `bytes` from `from` towards L2; the address need not be mapped.
inline void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 2);
}

// Panels side by side and rows on top of each other whose sums fit the registers, beside one row
// of weights and one input.
template <class T>
struct Blocking {
  static constexpr int kVectors = Vector<T>::kPerPanel;
  static constexpr int kPanels = kVectors == 1 ? 3 : 1;
  static constexpr int kWidth = kVectors * kPanels;
  static constexpr int kMost = (kRegisters - kWidth - 1) / kWidth;
  static constexpr int kRows = kMost < 1 ? 1 : kMost > 8 ? 8 : kMost;
};

template <class T, class V>
void store(const V& sums, int64_t cols, T* out) {
  std::memcpy(out, &sums, (cols < Vector<T>::kLanes ? cols : Vector<T>::kLanes) * sizeof(T));
}

// kRows rows x kPanels panels, the last of which may have fewer than 16 columns. As it goes through
// w it fetches as much from `ahead`: the processor's own prefetching starts anew with every panel.
template <class T, class W, int kRows, int kPanels>
void tile(const T* x, int64_t ldx, const W* w, const char* ahead, int64_t panel, int64_t depth,
          int64_t cols, T* out, int64_t ldo) {
  using Row = PanelRow<T, W>;
  constexpr int kVectors = Vector<T>::kPerPanel;
  Vec<T> sums[kRows][kPanels][kVectors] = {};
  const auto add = [&](int64_t i, int pairs) __attribute__((always_inline)) {
    for (int p = 0; p < kPanels; ++p) {
      prefetch(ahead + (p * panel + i * kPanel) * sizeof(W), Row::kPair * kPanel * sizeof(W));
    }
    // All panels' weights first: GCC keeps them in registers across the rows.
    const auto once = [&](int p) __attribute__((always_inline)) {
      return Row(w + p * panel + i * kPanel);
    };
    const auto rows = [&](const auto&... weights) __attribute__((always_inline)) {
      for (int h = 0; h < pairs; ++h) {
        for (int r = 0; r < kRows; ++r) {
          const T input = x[r * ldx + i + h];
          int p = 0;
          const auto one = [&](const Row& row) __attribute__((always_inline)) {
            for (int v = 0; v < kVectors; ++v) sums[r][p][v] += input * row.v[h][v];
            ++p;
          };
          (one(weights), ...);
        }
      }
    };
    if constexpr (kPanels == 3) {
      rows(once(0), once(1), once(2));
    } else if constexpr (kPanels == 2) {
      rows(once(0), once(1));
    } else {
      rows(once(0));
    }
  };
  // Summed in parts: one running sum over the whole depth would round once per input.
  Vec<T> totals[kRows][kPanels][kVectors] = {};
  for (int64_t i = 0; i < depth;) {
    const int64_t end = i + kDepthPart < depth ? i + kDepthPart : depth;
    for (; i + Row::kPair <= end; i += Row::kPair) add(i, Row::kPair);
    if (i < end) add(i++, 1);
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          totals[r][p][v] += sums[r][p][v];
          sums[r][p][v] = Vec<T>{};
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = p * kPanel + v * Vector<T>::kLanes;
        if (column < cols) store<T>(totals[r][p][v], cols - column, out + r * ldo + column);
      }
    }
  }
}

#if defined(__AVX512BF16__)
template <int kRows, int kPanels>
void native_tile(const uint16_t* x, int64_t ldx, const uint16_t* w, const char* ahead,
                 int64_t panel, int64_t depth, int64_t cols, float* out, int64_t ldo) {
  __m512 sums[kRows][kPanels];
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < depth; i += 2) {
    __m512i weights[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      weights[p] = _mm512_loadu_si512(w + p * panel + i * kPanel);
      prefetch(ahead + (p * panel + i * kPanel) * 2, kLineBytes);
    }
    for (int r = 0; r < kRows; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * ldx + i, sizeof two);
      const __m512i inputs = _mm512_set1_epi32(two);
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p] = _mm512_dpbf16_ps(sums[r][p], (__m512bh)inputs, (__m512bh)weights[p]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      const int64_t left = cols - p * kPanel;
      if (left > 0) store<float>(sums[r][p], left, out + r * ldo + p * kPanel);
    }
  }
}
#endif

template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};

// Calls f(first row, count) with tiles of kRows rows while they last; what is then left, with two
// tiles of about the same size if it is more than one, for a tile of one or two rows is slow.
template <int kRows, class F>
void for_tiles(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; rows - r == kRows || rows - r >= 2 * kRows; r += kRows) f(r, Constant<kRows>{});
  const auto some = [&](auto self, int64_t number, auto count) -> void {
    if constexpr (count.value > 0) {
      if (number == count.value) {
        f(r, count);
        r += number;
      } else {
        self(self, number, Constant<count.value - 1>{});
      }
    }
  };
  const int64_t left = rows - r;
  if (left > kRows) some(some, (left + 1) / 2, Constant<kRows>{});
  some(some, rows - r, Constant<kRows>{});
}

template <int kRows, int kPanels, class F>
void for_blocks(int64_t rows, int64_t cols, const F& f) {
  int64_t c = 0;
  for (; c < cols; c += kPanel * kPanels) {
    const int64_t left = cols - c;
    const int64_t panels = (left + kPanel - 1) / kPanel;
    for_tiles<kRows>(rows, [&](int64_t r, auto count) {
      if constexpr (kPanels >= 3) {
        if (panels >= 3) return f(r, c, left, count, Constant<3>{});
      }
      if constexpr (kPanels >= 2) {
        if (panels >= 2) return f(r, c, left, count, Constant<2>{});
      }
      f(r, c, left, count, Constant<1>{});
    });
  }
}

// What a tile should fetch: the first over a block of panels the next block, which follows in
// memory (after the last one, the next stream's); the others what is in the cache already.
template <class W>
const char* following(const W* block, int64_t row, int64_t elements) {
  const auto here = reinterpret_cast<uintptr_t>(block);
  return reinterpret_cast<const char*>(row == 0 ? here + elements * sizeof(W) : here);
}

template <class T, class W>
void multiply(const T* x, int64_t ldx, const void* panels, int64_t depth, int64_t rows,
              int64_t first, int64_t cols, T* out, int64_t ldo) {
  constexpr int kPair = PanelRow<T, W>::kPair;
  const int64_t panel = (depth + kPair - 1) / kPair * kPair * kPanel;
  const W* w = static_cast<const W*>(panels) + first / kPanel * panel;
  for_blocks<Blocking<T>::kRows, Blocking<T>::kPanels>(
      rows, cols, [&](int64_t r, int64_t c, int64_t left, auto count, auto wide) {
        const W* from = w + c / kPanel * panel;
        tile<T, W, count.value, wide.value>(x + r * ldx, ldx, from,
                                            following(from, r, wide.value * panel), panel, depth,
                                            left, out + r * ldo + c, ldo);
      });
}

#if defined(__AVX512BF16__)
void multiply_native(const uint16_t* x, int64_t ldx, const void* panels, int64_t depth,
                     int64_t rows, int64_t first, int64_t cols, float* out, int64_t ldo) {
  const int64_t panel = depth * kPanel;
  const uint16_t* w = static_cast<const uint16_t*>(panels) + first / kPanel * panel;
  for_blocks<8, 3>(rows, cols, [&](int64_t r, int64_t c, int64_t left, auto count, auto wide) {
    const uint16_t* from = w + c / kPanel * panel;
    native_tile<count.value, wide.value>(x + r * ldx, ldx, from,
                                         following(from, r, wide.value * panel), panel, depth, left,
                                         out + r * ldo + c, ldo);
  });
}

void round_rows(const float* x, int64_t ldx, int64_t rows, int64_t depth, uint16_t* out,
                int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, out += ldo) {
    for (int64_t i = 0; i < depth; ++i) {
      Bfloat16 rounded;
      narrow(x[i], &rounded);
      out[i] = rounded.bits;
    }
    if (depth % 2 != 0) out[depth] = 0;
  }
}
#endif

template <class T, class W>
PanelGemm<T> table() {
  return {multiply<T, W>, nullptr, nullptr, Blocking<T>::kPanels * kPanel};
}

}  // namespace

PanelGemm<double> C2C_JOIN(float64_gemm_, C2C_ISA)() { return table<double, double>(); }
PanelGemm<float> C2C_JOIN(float32_gemm_, C2C_ISA)() { return table<float, float>(); }
PanelGemm<float> C2C_JOIN(float16_gemm_, C2C_ISA)() { return table<float, Float16>(); }
PanelGemm<float> C2C_JOIN(bfloat16_gemm_, C2C_ISA)() {
  auto gemm = table<float, Bfloat16>();
#if defined(__AVX512BF16__)
  gemm.multiply_native = multiply_native;
  gemm.round_rows = round_rows;
#endif
  return gemm;
}

}  // namespace c2c::cpu
