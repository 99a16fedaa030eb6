/* test_compute_vec_avx2.c - the tests of vec.h, built for AVX2. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#endif
#include "tests/unit/test_compute_vec.c"
