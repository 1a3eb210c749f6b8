/* y = x W^T (+ bias) (+ y): W packed as [ceil(N/16)][K][16] in bf16 or float32, x and y float32.
 * Rows are taken in tiles of up to 6 (both sides in bf16: 12 of two blocks, 16 of one), blocks of 16 outputs one or two at a time; the order of operations for one
 * output is the same in every tile shape: k = 0 .. K-1, with float32 weights summed in parts of PART first (half the
 * rounding error of one long sum; weights in bf16 have more of their own). */
#include "pdk.h"

typedef struct {
    const float *x; const void *w; const float *bias; float *y;
    int R, N, K, ldx, ldy, bf16, add;
    const uint32_t *pairs; /* where DOTS: x [R, K] in bf16, two k in a word */
} Linear;

/* Whether weights in bf16 are multiplied by activations in bf16. */
int pd_rounds_inputs(void) { return DOTS; }

void pd_pack(const void *weight, int N, int K, int bf16, void *out) {
    for (int b = 0; b < (N + 15) / 16; b++)
        for (int k = 0; k < K; k++)
            for (int l = 0; l < 16; l++) {
                size_t to = (size_t)b * K * 16 + (bf16 ? half_index(k, l) : (size_t)k * 16 + l), from = (size_t)(b * 16 + l) * K + k;
                int in = b * 16 + l < N;
                if (bf16) ((uint16_t *)out)[to] = in ? ((const uint16_t *)weight)[from] : 0;
                else ((float *)out)[to] = in ? ((const float *)weight)[from] : 0;
            }
}

#define PART 32
#define DOT_ROWS 12 /* of two blocks: 24 sums in registers */
#define DOT_ALONE 16 /* of one block: with more than 17 compilers keep sums in memory, and 24 rows took twice the time of 25 */

INLINE void put(const Linear *t, int r, int b0, const vf *found, const int blocks) {
    float *y = t->y + (size_t)r * t->ldy;
    for (int v = 0; v < blocks * NV; v++) {
        int n = b0 * 16 + v * LANES;
        for (int l = 0; l < LANES && n + l < t->N; l++) {
            float s = found[v][l];
            if (t->bias) s += t->bias[n + l];
            y[n + l] = t->add ? y[n + l] + s : s;
        }
    }
}

/* ``ahead``: the blocks to bring into the cache meanwhile, one per block of this tile, or NULL. */
INLINE void tile(const Linear *t, int r0, int b0, const char *ahead, const int rows, const int blocks, const int bf16) {
    vf acc[6][2 * NV], sum[6][2 * NV];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < blocks * NV; v++) acc[r][v] = sum[r][v] = splat(0);
    const float *x[6];
    for (int r = 0; r < rows; r++) x[r] = t->x + (size_t)(r0 + r) * t->ldx;
    const size_t block = (size_t)t->K * 16, base = (size_t)b0 * block;
    const int line = bf16 ? 2 : 1; /* k steps per 64 bytes of a block */
    for (int k0 = 0; k0 < t->K; k0 += line) { /* K is a multiple of 16 */
        if (ahead)
            for (int b = 0; b < blocks; b++) __builtin_prefetch(ahead + b * block * (bf16 ? 2 : 4) + (size_t)k0 / line * 64, 0, 2);
        for (int k = k0; k < k0 + line; k++) {
            vf w[2 * NV];
            for (int b = 0; b < blocks; b++) load_block(t->w, base + b * block + (size_t)k * 16, w + b * NV, bf16);
            for (int r = 0; r < rows; r++) {
                vf xs = splat(x[r][k]);
                for (int v = 0; v < blocks * NV; v++) acc[r][v] = fma_add(xs, w[v], acc[r][v]);
            }
        }
        if (!bf16 && ((k0 + line) % PART == 0 || k0 + line == t->K))
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < blocks * NV; v++) {
                    sum[r][v] += acc[r][v];
                    acc[r][v] = splat(0);
                }
    }
    for (int r = 0; r < rows; r++) put(t, r0 + r, b0, bf16 ? acc[r] : sum[r], blocks);
}

#if DOTS
/* The same with both sides in bf16: pairs of k, in order. */
INLINE void dot_tile(const Linear *t, int r0, int b0, const char *ahead, size_t step, const int rows, const int blocks) {
    __m512 acc[DOT_ALONE][2];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++) acc[r][b] = _mm512_setzero_ps();
    const int pairs = t->K / 2;
    const size_t block = (size_t)pairs * 64; /* bytes */
    const char *w = (const char *)t->w + (size_t)b0 * block;
    const uint32_t *x[DOT_ALONE];
    for (int r = 0; r < rows; r++) x[r] = t->pairs + (size_t)(r0 + r) * (size_t)pairs;
    for (int k = 0; k < pairs; k++) {
        __m512bh weight[2];
        for (int b = 0; b < blocks; b++) {
            __builtin_prefetch(ahead + b * block + (size_t)k * step, 0, 2);
            weight[b] = (__m512bh)_mm512_loadu_si512(w + b * block + (size_t)k * 64);
        }
        for (int r = 0; r < rows; r++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)x[r][k]);
            for (int b = 0; b < blocks; b++) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], weight[b], both);
        }
    }
    for (int r = 0; r < rows; r++) {
        vf found[2];
        for (int b = 0; b < blocks; b++) found[b] = (vf)acc[r][b];
        put(t, r0 + r, b0, found, blocks);
    }
}

static void round_rows(const Linear *t, uint16_t *to) {
    for (int r = 0; r < t->R; r++)
        for (int k = 0; k < t->K; k += LANES)
            *(vh *)(to + (size_t)r * t->K + k) = narrow(load_f32(t->x + (size_t)r * t->ldx + k));
}
#endif

#define EARLY 4096 /* bytes */
#define CASE(rows, blocks) case rows: tile(t, r, b, ahead, rows, blocks, bf16); break
#define DOT_CASE(rows) case rows: if (wide) dot_tile(t, r, b, ahead, step, rows, 2); else dot_tile(t, r, b, ahead, step, rows, 1); break
#define DOT_MORE(rows) case rows: dot_tile(t, r, b, ahead, step, rows, 1); break
INLINE void column(const Linear *t, int r0, int r1, int b, const int wide, const int bf16) {
    const int most = DOTS && bf16 ? (wide || r1 - r0 > DOT_ALONE ? DOT_ROWS : DOT_ALONE) : 6;
    const int tiles = (r1 - r0 + most - 1) / most; /* even: 8 rows are 4 + 4, not 6 + 2 */
    /* The first tile waits for the weights and asks for them early; a last one that finds them in the cache fetches
     * the next block's. */
    const size_t next = (size_t)(b + (wide ? 2 : 1)) * t->K * 16 * (bf16 ? 2 : 4);
    for (int i = 0, r = r0; i < tiles; i++) {
        const char *own = (const char *)t->w + (size_t)b * t->K * 16 * (bf16 ? 2 : 4);
        const char *ahead = i == 0 ? own + EARLY : i == tiles - 1 ? (const char *)t->w + next : NULL;
#if DOTS
        const size_t step = (size_t)(64 / tiles); /* each tile fetches its part of the next block: memory is never idle */
        if (bf16 && tiles > 1) ahead = (const char *)t->w + next + (size_t)i * step * (size_t)(t->K / 2);
#endif
        int rows = (r1 - r + tiles - i - 1) / (tiles - i);
#if DOTS
        if (bf16) switch (rows) {
            DOT_CASE(1); DOT_CASE(2); DOT_CASE(3); DOT_CASE(4); DOT_CASE(5); DOT_CASE(6);
            DOT_CASE(7); DOT_CASE(8); DOT_CASE(9); DOT_CASE(10); DOT_CASE(11); DOT_CASE(12);
            DOT_MORE(13); DOT_MORE(14); DOT_MORE(15); DOT_MORE(16);
        } else
#endif
        if (wide) switch (rows) { CASE(1, 2); CASE(2, 2); CASE(3, 2); CASE(4, 2); CASE(5, 2); CASE(6, 2); }
        else switch (rows) { CASE(1, 1); CASE(2, 1); CASE(3, 1); CASE(4, 1); CASE(5, 1); CASE(6, 1); }
        r += rows;
    }
}

#define ROW_TILE 96
INLINE void span(const Linear *t, int chunk, int chunks, const int bf16) {
    int blocks = (t->N + 15) / 16;
    int from = (int)((long)blocks * chunk / chunks), to = (int)((long)blocks * (chunk + 1) / chunks);
    for (int r0 = 0; r0 < t->R; r0 += ROW_TILE) {
        int r1 = r0 + ROW_TILE < t->R ? r0 + ROW_TILE : t->R, b = from;
        /* Three rows of two blocks would not fit the registers of 256 bits; up to DOT_ALONE rows in bf16 are one tile. */
        const int both = DOTS && bf16 ? r1 - r0 <= DOT_ROWS || r1 - r0 > DOT_ALONE : t->R <= 2 || NV == 1;
        if (both)
            for (; b + 2 <= to; b += 2) column(t, r0, r1, b, 1, bf16);
        for (; b < to; b++) column(t, r0, r1, b, 0, bf16);
    }
}

static void run(void *arg, int chunk, int chunks) {
    const Linear *t = arg;
    if (t->bf16) span(t, chunk, chunks, 1); else span(t, chunk, chunks, 0);
}

void pd_linear(Pool *pool, const float *x, int ldx, const void *w, int bf16, const float *bias, float *y, int ldy,
               int R, int N, int K, int add) {
    Linear t = {x, w, bias, y, R, N, K, ldx, ldy, bf16, add, NULL};
#if DOTS
    if (bf16) {
        uint16_t *halves = (uint16_t *)pd_scratch(pool, (size_t)R * (size_t)K * 2);
        round_rows(&t, halves);
        t.pairs = (const uint32_t *)halves;
    }
#endif
    int blocks = (N + 15) / 16, chunks = 8 * pd_threads(pool);
    pd_parallel(pool, run, &t, chunks < blocks / 2 ? chunks : blocks / 2 > 0 ? blocks / 2 : 1);
}

/* Rows of a packed matrix: y[r] = W[ids[r]]. */
void pd_embed(const void *w, int bf16, int K, const int32_t *ids, int R, float *y) {
    for (int r = 0; r < R; r++) {
        size_t base = (size_t)(ids[r] / 16) * K * 16;
        for (int k = 0; k < K; k++) {
            if (bf16) {
                uint32_t u = (uint32_t)((const uint16_t *)w)[base + half_index(k, ids[r] % 16)] << 16;
                memcpy(&y[(size_t)r * K + k], &u, 4);
            } else y[(size_t)r * K + k] = ((const float *)w)[base + (size_t)k * 16 + (size_t)(ids[r] % 16)];
        }
    }
}
