/* test_compute_vec_avx512.c - the tests of vec.h, built for AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#include "tests/unit/test_compute_vec.c"
