/* Kernels of the CPU engine: row-invariant by construction.
 *
 * Every output row is computed by a sequence of operations that depends on that row's inputs alone: dot products
 * run over K in order, attention visits keys in the order of the token prefix in blocks counted from position 0.
 * How many rows stand beside a row, and which thread takes it, changes nothing in its bits.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* A block is 16 output lanes, held in NV vectors of the machine's width (or of the width that a test asks for). */
#if defined(PDSPEC_VECTOR_BYTES)
#define VB PDSPEC_VECTOR_BYTES
#elif defined(__AVX512F__)
#define VB 64
#elif defined(__AVX__)
#define VB 32
#else
#define VB 16
#endif
#define LANES (VB / 4)
#define NV (16 / LANES)

typedef float vf __attribute__((vector_size(VB), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VB), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VB), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VB / 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load_f32(const float *p) { return *(const vf *)p; }
INLINE vf load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) && VB == 64
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__) && VB == 32 /* one instruction; GCC makes four of the generic form */
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#endif
    return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16);
}
/* Packed bf16 weights: a block of 16 lanes is 8 words of 32 bits, word i holding lanes i (low) and i + 8 (high), so
 * that one load, a shift and a mask give both. With 512-bit vectors the lanes stand in order. */
#define PAIRED (LANES <= 8)
/* Where the machine multiplies bf16 by itself, two at a time: weights in bf16 are packed as [ceil(N/16)][K/2][16][2], and
 * activations are rounded to bf16 as well, as torch's bf16 linear does. */
#if !defined(PDSPEC_NO_DOTS) && defined(__AVX512BF16__) && VB == 64
#define DOTS 1
#else
#define DOTS 0
#endif
INLINE int lane_index(int lane) { return PAIRED ? lane % 8 * 2 + lane / 8 : lane; }
/* Where weight k of a lane stands in its block of bf16 weights. */
INLINE size_t half_index(int k, int lane) {
    return DOTS ? (size_t)(k / 2) * 32 + (size_t)(lane * 2 + k % 2) : (size_t)k * 16 + (size_t)lane_index(lane);
}
INLINE void load_block(const void *w, size_t i, vf out[NV], const int bf16) {
    if (!bf16) {
        for (int v = 0; v < NV; v++) out[v] = load_f32((const float *)w + i + v * LANES);
    } else if (PAIRED) {
        for (int v = 0; v < NV / 2; v++) {
            vu u = *(const vu *)((const uint16_t *)w + i + 2 * v * LANES);
            out[v] = (vf)(u << 16);
            out[v + NV / 2] = (vf)(u & 0xffff0000u);
        }
    } else out[0] = load_bf16((const uint16_t *)w + i);
}
INLINE vf splat(float x) { return x - (vf){0}; }
/* a * b + c in one rounding where the machine can. Said explicitly, and contraction is off (build.py): left to itself,
 * GCC fuses in one loop and not in another, and the same row would get other bits beside other rows. */
INLINE vf fma_add(vf a, vf b, vf c) {
#if defined(__AVX512F__) && VB == 64
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && VB == 32
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__) && VB == 16
    return (vf)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__aarch64__) && VB == 16
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
/* Halves onto halves: the same order at every call. */
INLINE float hsum(vf v) {
#if LANES == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}
/* The value, loaded once: without this GCC reads an operand that is used three times three times from memory, or
 * keeps so many at hand that accumulators are spilled. */
INLINE vf in_register(vf v) {
#if defined(__x86_64__) && (VB == 16 || (VB == 32 && defined(__AVX__)) || (VB == 64 && defined(__AVX512F__)))
    __asm__("" : "+x"(v));
#endif
    return v;
}
/* The sums of four vectors, each in one fixed order. */
#if LANES == 16
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)
#elif LANES == 8
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15)
#else
#define EVENS(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODDS(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#endif
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
INLINE v4 quarter(vf v, const int q) {
    v4 out;
    memcpy(&out, (const char *)&v + 16 * q, 16);
    return out;
}
INLINE v4 hsum4(const vf a[4]) {
    vf low = EVENS(a[0], a[1]) + ODDS(a[0], a[1]), high = EVENS(a[2], a[3]) + ODDS(a[2], a[3]);
    vf quads = EVENS(low, high) + ODDS(low, high); /* in each quarter of 128 bits: a part of each sum */
    v4 sums = quarter(quads, 0);
    for (int q = 1; q < LANES / 4; q++) sums += quarter(quads, q);
    return sums;
}
/* To bf16, round to nearest even as torch does. NaN stays NaN. */
INLINE vh narrow(vf x) {
    vu u = (vu)x, nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40) & nan), vh);
}

typedef struct Pool Pool;
typedef void (*task_fn)(void *arg, int chunk, int chunks);
void pd_parallel(Pool *pool, task_fn fn, void *arg, int chunks);
int pd_threads(const Pool *pool);
char *pd_scratch(Pool *pool, size_t bytes); /* the pool's own memory, valid until the next call; NULL without memory */

/* exp for x <= 88; Cephes polynomial, relative error about 1e-7; exactly 0 below -87. */
INLINE vf vexp(vf x) {
    const vf lowest = splat(-87.0f);
    vi dead = x < lowest;
    x = (vf)(((vi)x & ~dead) | ((vi)lowest & dead));
    vf n = x * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f; /* round to nearest */
    vf r = fma_add(n, splat(-0.693359375f), x);
    r = fma_add(n, splat(2.12194440e-4f), r);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    vf p = splat(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) p = fma_add(p, r, splat(terms[i]));
    p = fma_add(p * r, r, r) + 1.0f;
    vi e = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)e) & ~dead);
}
