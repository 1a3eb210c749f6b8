/* Paged attention for rows that see a prefix and, in trees, their ancestors. One work item is (row, KV head): the
 * query heads of a group share each K and V row they read. Keys are visited in the order of the token prefix. */
#include "pdk.h"
#include "layout.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    const float *q; float *out; const Rows *rows; const Cache *cache;
    float *scores; /* per chunk [group][capacity] */
    int Hq, ldq, capacity; _Atomic int next;
} Attend;

#define MAX_GROUP 16
#define MAX_DIM 256

INLINE vf load_kv(const char *p, int i, const int bf16) {
    return bf16 ? load_bf16((const uint16_t *)p + i) : load_f32((const float *)p + i);
}

INLINE int key_slot(const Rows *rows, int r, int j) {
    int prefix = rows->prefix_len[r];
    return j < prefix ? j : rows->ancestors[(size_t)r * rows->A + (j - prefix)];
}

INLINE int num_keys(const Rows *rows, int r) {
    int n = rows->prefix_len[r];
    for (int a = 0; a < rows->A && rows->ancestors[(size_t)r * rows->A + a] >= 0; a++) n++;
    return n;
}

INLINE void score_keys(const Attend *t, int r, int head, int n, const float *q, int group, float *s, const int bf16) {
    const Cache *c = t->cache;
    const int32_t *pages = sequence_pages(t->rows, r);
    const int D = c->dim, size = bf16 ? 2 : 4;
    for (int j = 0; j < n; j++) {
        const char *k = cache_row(c, pages, key_slot(t->rows, r, j)) + (size_t)head * D * size;
        vf key[MAX_DIM / LANES];
        for (int i = 0; i < D / LANES; i++) key[i] = load_kv(k, i * LANES, bf16);
        for (int g = 0; g < group; g++) {
            vf acc = splat(0);
            for (int i = 0; i < D / LANES; i++) acc += load_f32(q + g * D + i * LANES) * key[i];
            s[(size_t)g * t->capacity + j] = hsum(acc);
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

INLINE void mix_part(const Attend *t, int r, int head, int n, const float *s, float *out, int d0, const int group,
                     const int vecs, const int bf16) {
    const Cache *c = t->cache;
    const int32_t *pages = sequence_pages(t->rows, r);
    const size_t offset = ((size_t)(c->heads + head) * c->dim + d0) * (bf16 ? 2 : 4);
    vf acc[3][4];
    for (int g = 0; g < group; g++) for (int i = 0; i < vecs; i++) acc[g][i] = splat(0);
    for (int j = 0; j < n; j++) {
        const char *v = cache_row(c, pages, key_slot(t->rows, r, j)) + offset;
        for (int i = 0; i < vecs; i++) {
            vf value = load_kv(v, i * LANES, bf16);
            for (int g = 0; g < group; g++) acc[g][i] += s[(size_t)g * t->capacity + j] * value;
        }
    }
    for (int g = 0; g < group; g++)
        for (int i = 0; i < vecs; i++) *(vf *)(out + (size_t)g * c->dim + d0 + i * LANES) = acc[g][i];
}

#define MIX(g, v) mix_part(t, r, head, n, s + (size_t)g0 * t->capacity, out + (size_t)g0 * D, d, g, v, bf16)
INLINE void mix(const Attend *t, int r, int head, int n, const float *s, float *out, int group, const int bf16) {
    const int D = t->cache->dim;
    for (int d = 0; d < D;) {
        int vecs = (D - d) / LANES >= 4 ? 4 : 1;
        for (int g0 = 0; g0 < group; g0 += 3) {
            int g = group - g0 < 3 ? group - g0 : 3;
            if (vecs == 4) switch (g) { case 1: MIX(1, 4); break; case 2: MIX(2, 4); break; default: MIX(3, 4); }
            else switch (g) { case 1: MIX(1, 1); break; case 2: MIX(2, 1); break; default: MIX(3, 1); }
        }
        d += vecs * LANES;
    }
}

INLINE void item(const Attend *t, int r, int head, float *s, const int bf16) {
    const Cache *c = t->cache;
    int D = c->dim, group = t->Hq / c->heads, n = num_keys(t->rows, r);
    float q[MAX_GROUP * MAX_DIM], scale = 1.0f / sqrtf((float)D);
    const float *from = t->q + (size_t)r * t->ldq + (size_t)head * group * D;
    for (int i = 0; i < group * D; i++) q[i] = from[i] * scale;
    score_keys(t, r, head, n, q, group, s, bf16);
    float sums[MAX_GROUP];
    for (int g = 0; g < group; g++) sums[g] = soften(s + (size_t)g * t->capacity, n);
    float *out = t->out + (size_t)r * t->Hq * D + (size_t)head * group * D;
    mix(t, r, head, n, s, out, group, bf16);
    for (int g = 0; g < group; g++)
        for (int i = 0; i < D; i++) out[g * D + i] /= sums[g];
}

static void run(void *arg, int chunk, int chunks) {
    Attend *t = arg;
    (void)chunks;
    int heads = t->cache->heads, group = t->Hq / heads, items = t->rows->R * heads;
    float *s = t->scores + (size_t)chunk * group * t->capacity;
    for (int i; (i = atomic_fetch_add(&t->next, 1)) < items;) {
        /* the last rows are usually the longest: take them first */
        int r = t->rows->R - 1 - i / heads, head = i % heads;
        if (t->cache->bf16) item(t, r, head, s, 1); else item(t, r, head, s, 0);
    }
}

/* out[R, Hq*D] = softmax(q K^T / sqrt(D)) V over each row's keys. Returns 0, or -1 without memory. */
int pd_attend(Pool *pool, const float *q, int ldq, int Hq, float *out, const Rows *rows, const Cache *cache) {
    int longest = 1;
    for (int r = 0; r < rows->R; r++) longest = rows->prefix_len[r] > longest ? rows->prefix_len[r] : longest;
    int capacity = (longest + rows->A + 31) / 16 * 16;
    size_t bytes = (size_t)pd_threads(pool) * (Hq / cache->heads) * capacity * sizeof(float);
    float *scores = malloc(bytes);
    if (!scores) return -1;
    Attend t = {.q = q, .out = out, .rows = rows, .cache = cache, .scores = scores, .Hq = Hq, .ldq = ldq, .capacity = capacity};
    pd_parallel(pool, run, &t, pd_threads(pool));
    free(scores);
    return 0;
}
