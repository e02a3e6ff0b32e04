// Eight floats, for code that is compiled for AVX2.

#ifndef JAXCNN_NATIVE_VECTOR_H_
#define JAXCNN_NATIVE_VECTOR_H_

#define JAXCNN_AVX2 __attribute__((target("avx2,fma")))

namespace jaxcnn {

typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace jaxcnn

#endif  // JAXCNN_NATIVE_VECTOR_H_
