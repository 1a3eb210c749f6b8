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
#if defined(__AVX2__)
#include <immintrin.h>
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
INLINE int lane_index(int lane) { return PAIRED ? lane % 8 * 2 + lane / 8 : lane; }
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
INLINE float hsum(vf v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}
/* Round to nearest even, as torch does. NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

typedef struct Pool Pool;
typedef void (*task_fn)(void *arg, int chunk, int chunks);
void pd_parallel(Pool *pool, task_fn fn, void *arg, int chunks);
int pd_threads(const Pool *pool);

/* exp for x <= 88; Cephes polynomial, relative error about 1e-7; exactly 0 below -87. */
INLINE vf vexp(vf x) {
    const vf lowest = splat(-87.0f);
    vi dead = x < lowest;
    x = (vf)(((vi)x & ~dead) | ((vi)lowest & dead));
    vf n = x * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f; /* round to nearest */
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi e = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)e) & ~dead);
}
