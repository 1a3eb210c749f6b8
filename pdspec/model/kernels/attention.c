/* Paged attention for rows that see a prefix and, in trees, their ancestors.
 *
 * One work item is (tile, KV head): a tile is a few rows of one sequence, and all their query heads share each K and V
 * row of the prefix that they have in common; what only one row sees follows row by row. For one query the operations
 * are the same in every tiling: a score is one dot product of fixed order, keys are mixed in the order of the token
 * prefix. */
#include "pdk.h"
#include "layout.h"
#include <math.h>
#include <stdatomic.h>

#define MAX_QUERIES 16 /* of a tile: rows x query heads of a group */
#define TILE_QUERIES 12
#define MAX_DIM 640 /* a latent row of DeepSeek-V3 has 576 values */
#define AHEAD 8 /* keys between a prefetch and its use */
#define KEY_BLOCK 128 /* keys that stay in the first cache while all queries visit them */

typedef struct {
    const float *q; float *out; const Rows *rows; const Cache *cache;
    char *scratch; size_t scratch_bytes; /* per chunk: scores [queries][capacity], key addresses [capacity] */
    int Hq, ldq, capacity, tiles;
    const int32_t *tile_start; /* [tiles + 1] */
    _Atomic int next;
} Attend;

INLINE vf load_kv(const char *p, int i, const int bf16) {
    return bf16 ? load_bf16((const uint16_t *)p + i) : load_f32((const float *)p + i);
}

INLINE void prefetch(const char *p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

static int num_ancestors(const Rows *rows, int r) {
    int n = 0;
    while (n < rows->A && rows->ancestors[(size_t)r * rows->A + n] >= 0) n++;
    return n;
}

#define ONE_FUNCTION static __attribute__((noinline)) /* registers are for one loop at a time */
#define SCORE_ARGS const float *q, const char *const *at, int from, int to, float *s, int capacity, int D
/* s[query][j] for keys j in [from, to), four at a time; q is [queries][D], already scaled. */
INLINE void score_block(SCORE_ARGS, const int queries, const int vecs, const int bf16) {
    for (int j = from; j < to; j += 4) {
        int n = to - j < 4 ? to - j : 4;
        const char *key[4];
        for (int k = 0; k < 4; k++) {
            key[k] = at[j + (k < n ? k : n - 1)];
            if (j + k + AHEAD < to) prefetch(at[j + k + AHEAD], D * (bf16 ? 2 : 4));
        }
        vf acc[3][4];
        for (int g = 0; g < queries; g++)
            for (int k = 0; k < 4; k++) acc[g][k] = splat(0);
        for (int i = 0; i < vecs; i++) {
            vf qs[3];
            for (int g = 0; g < queries; g++) qs[g] = in_register(load_f32(q + g * D + i * LANES));
            for (int k = 0; k < 4; k++) {
                vf part = load_kv(key[k], i * LANES, bf16);
                for (int g = 0; g < queries; g++) acc[g][k] = fma_add(qs[g], part, acc[g][k]);
            }
        }
        for (int g = 0; g < queries; g++) {
            v4 sums = hsum4(acc[g]);
            float *to = s + (size_t)g * capacity + j;
            if (n == 4) *(v4 *)to = sums;
            else for (int k = 0; k < n; k++) to[k] = sums[k];
        }
    }
}
#define SCORE(g, bf16) ONE_FUNCTION void score_##g##_##bf16(SCORE_ARGS) { \
    if (D == 64) score_block(q, at, from, to, s, capacity, 64, g, 64 / LANES, bf16); \
    else score_block(q, at, from, to, s, capacity, D, g, D / LANES, bf16); }
SCORE(1, 0) SCORE(2, 0) SCORE(3, 0) SCORE(1, 1) SCORE(2, 1) SCORE(3, 1)

static void score(const float *q, int queries, const char *const *at, int from, int to, float *s, int capacity, int D, int bf16) {
    static void (*const block[2][3])(SCORE_ARGS) = {{score_1_0, score_2_0, score_3_0}, {score_1_1, score_2_1, score_3_1}};
    for (int j = from, end; j < to; j = end) {
        end = to - j < KEY_BLOCK ? to : j + KEY_BLOCK;
        for (int g0 = 0, g; g0 < queries; g0 += g) {
            g = queries - g0 < 3 ? queries - g0 : 3;
            block[bf16][g - 1](q + (size_t)g0 * D, at, j, end, s + (size_t)g0 * capacity, capacity, D);
        }
    }
}

/* In place: s becomes exp(s - max) padded with zeros to whole vectors; returns the sum. */
static float soften(float *s, int n) {
    int padded = (n + LANES - 1) / LANES * LANES;
    for (int j = n; j < padded; j++) s[j] = -INFINITY;
    vf best = load_f32(s);
    for (int j = LANES; j < padded; j += LANES) {
        vf v = load_f32(s + j);
        vi more = v > best;
        best = (vf)(((vi)v & more) | ((vi)best & ~more));
    }
    float top = best[0];
    for (int l = 1; l < LANES; l++) top = best[l] > top ? best[l] : top;
    vf sum = splat(0);
    for (int j = 0; j < padded; j += LANES) {
        vf e = vexp(load_f32(s + j) - top);
        *(vf *)(s + j) = e;
        sum += e;
    }
    return hsum(sum);
}

#define MIX_ARGS float *out, const char *const *at, size_t offset, int from, int to, const float *s, int capacity, int D
/* out[g][i] += sum over j in [from, to) of s[g][j] v_j[i]; ``offset`` leads from a key to its value. */
INLINE void mix_block(MIX_ARGS, const int queries, const int vecs, const int bf16) {
    vf acc[6][4];
    for (int g = 0; g < queries; g++)
        for (int i = 0; i < vecs; i++) acc[g][i] = load_f32(out + (size_t)g * D + i * LANES);
    for (int j = from; j < to; j++) {
        if (j + AHEAD < to) prefetch(at[j + AHEAD] + offset, vecs * LANES * (bf16 ? 2 : 4));
        vf value[4];
        for (int i = 0; i < vecs; i++) value[i] = load_kv(at[j] + offset, i * LANES, bf16);
        for (int g = 0; g < queries; g++) {
            vf weight = in_register(splat(s[(size_t)g * capacity + j]));
            for (int i = 0; i < vecs; i++) acc[g][i] = fma_add(weight, value[i], acc[g][i]);
        }
    }
    for (int g = 0; g < queries; g++)
        for (int i = 0; i < vecs; i++) *(vf *)(out + (size_t)g * D + i * LANES) = acc[g][i];
}
#define MIX(g, v, bf16) ONE_FUNCTION void mix_##g##_##v##_##bf16(MIX_ARGS) { \
    mix_block(out, at, offset, from, to, s, capacity, D, g, v, bf16); }
MIX(1, 1, 0) MIX(2, 1, 0) MIX(3, 1, 0) MIX(6, 1, 0) MIX(1, 4, 0) MIX(2, 4, 0) MIX(3, 4, 0) MIX(6, 2, 0)
MIX(1, 1, 1) MIX(2, 1, 1) MIX(3, 1, 1) MIX(6, 1, 1) MIX(1, 4, 1) MIX(2, 4, 1) MIX(3, 4, 1) MIX(6, 2, 1)

static void mix(float *out, int queries, const char *const *at, size_t offset, int from, int to, const float *s,
                int capacity, int D, int bf16) {
    typedef void (*mix_fn)(MIX_ARGS); /* [dtype][one vector or several][queries: 1, 2, 3, 6]: 12 accumulators at most */
    static const mix_fn block[2][2][4] = {
        {{mix_1_1_0, mix_2_1_0, mix_3_1_0, mix_6_1_0}, {mix_1_4_0, mix_2_4_0, mix_3_4_0, mix_6_2_0}},
        {{mix_1_1_1, mix_2_1_1, mix_3_1_1, mix_6_1_1}, {mix_1_4_1, mix_2_4_1, mix_3_4_1, mix_6_2_1}}};
    for (int j = from, end; j < to; j = end) {
        end = to - j < KEY_BLOCK ? to : j + KEY_BLOCK;
        for (int g0 = 0, g; g0 < queries; g0 += g) {
            g = queries - g0 >= 6 ? 6 : queries - g0 < 3 ? queries - g0 : 3;
            for (int d = 0, vecs; d < D; d += vecs * LANES) {
                int most = g == 6 ? 2 : 4, wide = (D - d) / LANES >= most;
                vecs = wide ? most : 1;
                block[bf16][wide][g == 6 ? 3 : g - 1](out + (size_t)g0 * D + d, at, offset + (size_t)d * (bf16 ? 2 : 4), j, end,
                                                      s + (size_t)g0 * capacity, capacity, D);
            }
        }
    }
}

static void item(const Attend *t, int r0, int r1, int head, float *s, const char **at, int bf16) {
    const Cache *c = t->cache;
    const Rows *rows = t->rows;
    const int D = c->dim, group = t->Hq / c->heads, queries = (r1 - r0) * group, size = bf16 ? 2 : 4;
    const size_t lead = (size_t)head * D * size, offset = c->parts == 1 ? 0 : (size_t)c->heads * D * size;
    float q[MAX_QUERIES * MAX_DIM], out[MAX_QUERIES * MAX_DIM], scale = 1.0f / sqrtf((float)D);
    int shared = rows->prefix_len[r0], longest = 0;
    for (int r = r0; r < r1; r++) {
        const float *from = t->q + (size_t)r * t->ldq + (size_t)head * group * D;
        for (int i = 0; i < group * D; i++) q[(r - r0) * group * D + i] = from[i] * scale;
        if (rows->prefix_len[r] < shared) shared = rows->prefix_len[r];
        if (rows->prefix_len[r] > longest) longest = rows->prefix_len[r];
    }
    memset(out, 0, sizeof(float) * (size_t)(queries * D));
    const int32_t *pages = sequence_pages(rows, r0);
    for (int j = 0; j < longest; j++) at[j] = cache_row(c, pages, j) + lead;
    score(q, queries, at, 0, shared, s, t->capacity, D, bf16);
    float sums[MAX_QUERIES];
    for (int r = r0; r < r1; r++) { /* what this row sees beyond the shared prefix, then the softmax */
        int prefix = rows->prefix_len[r], n = prefix + num_ancestors(rows, r), g = (r - r0) * group;
        const char **own = at + t->capacity + (size_t)(r - r0) * rows->A - prefix; /* own[prefix ..] */
        for (int j = prefix; j < n; j++)
            own[j] = cache_row(c, pages, rows->ancestors[(size_t)r * rows->A + (j - prefix)]) + lead;
        score(q + g * D, group, at, shared, prefix, s + (size_t)g * t->capacity, t->capacity, D, bf16);
        score(q + g * D, group, own, prefix, n, s + (size_t)g * t->capacity, t->capacity, D, bf16);
        for (int i = g; i < g + group; i++) sums[i] = soften(s + (size_t)i * t->capacity, n);
    }
    mix(out, queries, at, offset, 0, shared, s, t->capacity, D, bf16);
    for (int r = r0; r < r1; r++) {
        int prefix = rows->prefix_len[r], n = prefix + num_ancestors(rows, r), g = (r - r0) * group;
        const char **own = at + t->capacity + (size_t)(r - r0) * rows->A - prefix;
        mix(out + g * D, group, at, offset, shared, prefix, s + (size_t)g * t->capacity, t->capacity, D, bf16);
        mix(out + g * D, group, own, offset, prefix, n, s + (size_t)g * t->capacity, t->capacity, D, bf16);
        float *to = t->out + (size_t)r * t->Hq * D + (size_t)head * group * D;
        for (int i = 0; i < group * D; i++) to[i] = out[g * D + i] / sums[g + i / D];
    }
}

static void run(void *arg, int chunk, int chunks) {
    Attend *t = arg;
    (void)chunks;
    int heads = t->cache->heads, items = t->tiles * heads;
    float *s = (float *)(t->scratch + (size_t)chunk * t->scratch_bytes);
    const char **at = (const char **)(s + (size_t)MAX_QUERIES * t->capacity);
    for (int i; (i = atomic_fetch_add(&t->next, 1)) < items;) {
        int tile = t->tiles - 1 - i / heads, head = i % heads; /* the last rows are usually the longest: first */
        int r0 = t->tile_start[tile], r1 = t->tile_start[tile + 1];
        item(t, r0, r1, head, s, at, t->cache->bf16);
    }
}

/* Rows of one sequence that stand together, at most ``most`` of them: start[0 .. tiles]. */
static int cut_tiles(const Rows *rows, int most, int32_t *start) {
    int tiles = 0;
    for (int r = 0; r < rows->R; r++)
        if (!tiles || rows->sequence[r] != rows->sequence[start[tiles - 1]] || r - start[tiles - 1] == most)
            start[tiles++] = r;
    start[tiles] = rows->R;
    return tiles;
}

/* out[R, Hq*D] = softmax(q K^T / sqrt(D)) V over each row's keys. Returns 0, or -1 without memory. */
int pd_attend(Pool *pool, const float *q, int ldq, int Hq, float *out, const Rows *rows, const Cache *cache) {
    int longest = 1, group = Hq / cache->heads, threads = pd_threads(pool);
    for (int r = 0; r < rows->R; r++) longest = rows->prefix_len[r] > longest ? rows->prefix_len[r] : longest;
    int capacity = (longest + rows->A + 31) / 16 * 16, most = TILE_QUERIES / group;
    int balanced = rows->R * cache->heads / (4 * threads); /* few rows: rather more items than wider tiles */
    most = most < balanced ? most : balanced;
    if (most < 1) most = 1;
    size_t bytes = (size_t)capacity * (MAX_QUERIES * sizeof(float) + sizeof(char *)) + (size_t)most * rows->A * sizeof(char *);
    bytes = (bytes + 63) / 64 * 64;
    size_t starts = ((size_t)rows->R + 1) * sizeof(int32_t);
    char *scratch = pd_scratch(pool, (size_t)threads * bytes + starts);
    if (!scratch) return -1;
    int32_t *start = (int32_t *)(scratch + (size_t)threads * bytes);
    int tiles = cut_tiles(rows, most, start);
    Attend t = {.q = q, .out = out, .rows = rows, .cache = cache, .scratch = scratch, .scratch_bytes = bytes, .Hq = Hq,
                .ldq = ldq, .capacity = capacity, .tiles = tiles, .tile_start = start};
    pd_parallel(pool, run, &t, threads);
    return 0;
}
