/* vec.h - sixteen float lanes for the kernel sources, the same in every instruction family.
 *
 * A v16 is one 64-byte register with AVX-512, two of 32 bytes with AVX2 and four of 16 otherwise
 * (NEON where __ARM_FEATURE_DOTPROD says that the family is "dotprod").
 * It is a struct of parts and not a 64-byte GCC vector, because gcc keeps vectors wider than the
 * machine's in memory. Loads and stores take any alignment.  Lanes never mix except in v16_sum and
 * v16_hmax, which add in one fixed tree:  ((l0 + l8) + (l4 + l12)) + ((l2 + l10) + (l6 + l14)) +
 * the same over odd lanes.
 *
 * Kernel files are compiled with -ffp-contract=off, so the only fused operation is v16_fma: a product
 * and a sum in portable C, fused otherwise.  Kernels that use it agree to the bit between the families
 * that fuse; kernels without it agree between all. */
#ifndef URCHIN_COMPUTE_VEC_H
#define URCHIN_COMPUTE_VEC_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define V_PARTS 1
#elif defined(__AVX2__)
#define V_PARTS 2
#else
#define V_PARTS 4
#endif
#define V_LANES (16 / V_PARTS) /* lanes of a part */
#define V_FN static inline __attribute__((always_inline))
#define V_EACH _Pragma("GCC unroll 4") for (int i = 0; i < V_PARTS; i++)

typedef float v_part __attribute__((vector_size(64 / V_PARTS)));
typedef int32_t v_part_i __attribute__((vector_size(64 / V_PARTS)));
typedef uint32_t v_part_u __attribute__((vector_size(64 / V_PARTS)));
typedef uint16_t v_part_h __attribute__((vector_size(32 / V_PARTS)));
typedef float v_part_any __attribute__((vector_size(64 / V_PARTS), aligned(4), may_alias));
typedef int32_t v_part_i_any __attribute__((vector_size(64 / V_PARTS), aligned(4), may_alias));
typedef uint16_t v_part_h_any __attribute__((vector_size(32 / V_PARTS), aligned(2), may_alias));

typedef struct {
    v_part p[V_PARTS];
} v16; /* lane l is p[l / V_LANES][l % V_LANES] */
typedef struct {
    v_part_i p[V_PARTS];
} v16i; /* sixteen int32 lanes */

V_FN v16 v16_set1(float x) {
    v16 r;
    V_EACH r.p[i] = x - (v_part){0};
    return r;
}
V_FN v16 v16_zero(void) {
    return v16_set1(0);
}
V_FN v16 v16_load(const float *src) {
    v16 r;
    V_EACH r.p[i] = *(const v_part_any *)(src + V_LANES * i);
    return r;
}
V_FN void v16_store(float *dst, v16 a) {
    V_EACH *(v_part_any *)(dst + V_LANES * i) = a.p[i];
}
/* The first n <= 16 lanes; the others load as 0 and are not stored. */
V_FN v16 v16_load_part(const float *src, int n) {
    float whole[16] = {0};
    memcpy(whole, src, (size_t)n * sizeof *src);
    return v16_load(whole);
}
V_FN void v16_store_part(float *dst, v16 a, int n) {
    float whole[16];
    v16_store(whole, a);
    memcpy(dst, whole, (size_t)n * sizeof *dst);
}

V_FN v16 v16_add(v16 a, v16 b) {
    V_EACH a.p[i] += b.p[i];
    return a;
}
V_FN v16 v16_sub(v16 a, v16 b) {
    V_EACH a.p[i] -= b.p[i];
    return a;
}
V_FN v16 v16_mul(v16 a, v16 b) {
    V_EACH a.p[i] *= b.p[i];
    return a;
}
V_FN v16 v16_div(v16 a, v16 b) {
    V_EACH a.p[i] /= b.p[i];
    return a;
}

V_FN v_part v_part_fma(v_part a, v_part b, v_part c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_DOTPROD)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}
V_FN v16 v16_fma(v16 a, v16 b, v16 c) { /* a b + c */
    V_EACH a.p[i] = v_part_fma(a.p[i], b.p[i], c.p[i]);
    return a;
}

V_FN v_part v_part_select(v_part_i where, v_part a, v_part b) { /* where ? a : b */
    return (v_part)((where & (v_part_i)a) | (~where & (v_part_i)b));
}
V_FN v_part v_part_max(v_part a, v_part b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return v_part_select(a > b, a, b);
#endif
}
V_FN v_part v_part_min(v_part a, v_part b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return v_part_select(a < b, a, b);
#endif
}
V_FN v16 v16_max(v16 a, v16 b) { /* a > b ? a : b, so b where one is NaN */
    V_EACH a.p[i] = v_part_max(a.p[i], b.p[i]);
    return a;
}
V_FN v16 v16_min(v16 a, v16 b) { /* a < b ? a : b, so b where one is NaN */
    V_EACH a.p[i] = v_part_min(a.p[i], b.p[i]);
    return a;
}
V_FN v16 v16_abs(v16 a) {
    V_EACH a.p[i] = (v_part)((v_part_i)a.p[i] & 0x7fffffff);
    return a;
}

typedef float v_quarter __attribute__((vector_size(16)));
V_FN v_quarter v16_fold(v16 a,
                        int max) { /* lanes l, l + 8, l + 4, l + 12 together: (0 + 8) + (4 + 12) */
#if defined(__AVX512F__)
    __m256 lo = _mm512_castps512_ps256(a.p[0]);
    __m256 hi = _mm512_extractf32x8_ps(a.p[0], 1);
#elif defined(__AVX2__)
    __m256 lo = a.p[0], hi = a.p[1];
#endif
#if defined(__AVX2__)
    __m256 eight = max ? _mm256_max_ps(lo, hi) : _mm256_add_ps(lo, hi);
    v_quarter e = _mm256_castps256_ps128(eight), f = _mm256_extractf128_ps(eight, 1);
    return max ? (v_quarter)_mm_max_ps(e, f) : e + f;
#else
    if (max) return v_part_max(v_part_max(a.p[0], a.p[2]), v_part_max(a.p[1], a.p[3]));
    return (a.p[0] + a.p[2]) + (a.p[1] + a.p[3]);
#endif
}
V_FN float v16_sum(v16 a) {
    v_quarter q = v16_fold(a, 0);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
V_FN float v16_hmax(v16 a) { /* of lanes that are not NaN */
    v_quarter q = v16_fold(a, 1);
    float even = q[0] > q[2] ? q[0] : q[2], odd = q[1] > q[3] ? q[1] : q[3];
    return even > odd ? even : odd;
}

/* ---- 16-bit floats in memory ---- */
V_FN v16 v16_load_bf16(const uint16_t *src) {
    v16 r;
    V_EACH {
#if defined(__AVX512F__) /* gcc 12 widens a whole vector in two halves */
        v_part_u wide = (v_part_u)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)src));
#elif defined(__AVX2__)
        v_part_u wide =
            (v_part_u)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(src + V_LANES * i)));
#else
        v_part_h h = *(const v_part_h_any *)(src + V_LANES * i);
        v_part_u wide = __builtin_convertvector(h, v_part_u);
#endif
        r.p[i] = (v_part)(wide << 16);
    }
    return r;
}
/* Lanes 0 .. 15 and 16 .. 31. */
V_FN void v16_load_bf16_pair(const uint16_t *src, v16 *low, v16 *high) {
#if defined(__AVX512BW__) /* one instruction each, where widening and shifting are two */
    const v_part_u lane = {0,       0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x70000,
                           0x80000, 0x90000, 0xa0000, 0xb0000, 0xc0000, 0xd0000, 0xe0000, 0xf0000};
    __m512i both = _mm512_loadu_si512(src);
    low->p[0] = (v_part)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)lane, both);
    high->p[0] =
        (v_part)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(lane + 0x100000), both);
#else
    *low = v16_load_bf16(src);
    *high = v16_load_bf16(src + 16);
#endif
}
V_FN void v16_store_bf16(uint16_t *dst, v16 a) { /* as bf16_round() of ops.h */
    V_EACH {
        v_part_u u = (v_part_u)a.p[i];
        v_part_u nan = (v_part_u)(a.p[i] != a.p[i]);
        v_part_u even = u + 0x7fff + (u >> 16 & 1);
        v_part_u h = ((nan & (u | 0x400000)) | (~nan & even)) >> 16;
        *(v_part_h_any *)(dst + V_LANES * i) = __builtin_convertvector(h, v_part_h);
    }
}
V_FN v16 v16_load_fp16(const uint16_t *src) {
    v16 r;
    V_EACH {
#if defined(__AVX512F__)
        r.p[i] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)src));
#elif defined(__AVX2__)
        r.p[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + V_LANES * i)));
#elif defined(__ARM_FEATURE_DOTPROD)
        r.p[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(src + V_LANES * i)));
#else
        v_part_u h = __builtin_convertvector(*(const v_part_h_any *)(src + V_LANES * i), v_part_u);
        v_part_u magnitude = h & 0x7fff;
        v_part finite = (v_part)(magnitude << 13) * 0x1p112f; /* exact, denormals included */
        v_part_u special = (v_part_u)(magnitude >= 0x7c00) & 0x7f800000;
        v_part_u quiet = (v_part_u)(magnitude > 0x7c00) & 0x400000;
        r.p[i] = (v_part)((v_part_u)finite | (h & 0x8000) << 16 | special | quiet);
#endif
    }
    return r;
}

/* ---- exp ---- */
/* e^x to within 1.1 ulp (test_compute.c tries every exponent), denormal results included.
 * exp(-inf) = 0, overflow gives infinity, NaN stays NaN; exp(0) = 1 exactly.
 *
 * x = n ln2 + r with |r| <= ln2 / 2; e^r = 1 + r + r^2 q(r), q of degree 4 fitted for the smallest
 * greatest relative error (3.1e-9 = 2^-28.3).  2^n is applied as two factors, so that one rounding
 * happens at most. */
V_FN v16 v16_exp(v16 x) {
    v16 r;
    V_EACH {
        /* Beyond these the result is 0 or infinity.  A NaN is the second operand, so it stays. */
        v_part limit = v_part_min(89 - (v_part){0}, v_part_max(-105 - (v_part){0}, x.p[i]));
        const v_part magic =
            0x1.8p23f - (v_part){0}; /* adding it rounds to an integer in the low bits */
        v_part shifted = v_part_fma(limit, 0x1.715476p0f - (v_part){0}, magic);
        v_part n = shifted - magic;
        /* ln2 in two parts; n times the first (15 bits) is exact */
        v_part t = v_part_fma(n, -0x1.62e4p-1f - (v_part){0}, limit);
        t = v_part_fma(n, -0x1.7f7d1cp-20f - (v_part){0}, t);
        v_part q = 0x1.6a2434p-10f - (v_part){0};
        q = v_part_fma(q, t, 0x1.1239e2p-7f - (v_part){0});
        q = v_part_fma(q, t, 0x1.5558f2p-5f - (v_part){0});
        q = v_part_fma(q, t, 0x1.555492p-3f - (v_part){0});
        q = v_part_fma(q, t, 0x1.fffffcp-2f - (v_part){0});
        v_part e = v_part_fma(q, t * t, t) + 1;
#if defined(__AVX512F__)
        r.p[i] = _mm512_scalef_ps(e, n);
#else
        v_part_i k = (v_part_i)((v_part_u)shifted - (v_part_u)magic);
        v_part_i half = k >> 1;
        v_part a = (v_part)((v_part_u)(half + 127) << 23);
        v_part b = (v_part)((v_part_u)(k - half + 127) << 23);
        r.p[i] = e * a * b;
#endif
    }
    return r;
}

#endif
