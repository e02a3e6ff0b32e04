// Vectors of floats, for code that is compiled for AVX2 and for AVX-512.

#ifndef JAXCNN_NATIVE_VECTOR_H_
#define JAXCNN_NATIVE_VECTOR_H_

#include <cstdint>

namespace jaxcnn {

// Each runs a function object whose operator() is always inlined, and so compiled for these instructions.

struct Avx2 {
  typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
  static constexpr int64_t lanes = 8;
  // Rows of a tile of one vector and of two, whose sums fit into 16 registers.
  static constexpr int rows_of_one = 12, rows_of_two = 6;

  template <typename Body>
  __attribute__((target("avx2,fma"))) static void run(const Body& body) {
    body();
  }
};

struct Avx512 {
  typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
  static constexpr int64_t lanes = 16;
  static constexpr int rows_of_one = 24, rows_of_two = 14;  // 32 registers

  template <typename Body>
  __attribute__((target("avx512f"))) static void run(const Body& body) {
    body();
  }
};

}  // namespace jaxcnn

#endif  // JAXCNN_NATIVE_VECTOR_H_
