/* Row-wise operations: RMS norm, SwiGLU, rotary embedding with the store into KV pages. */
#include "pdk.h"
#include "layout.h"
#include <math.h>

typedef struct { const float *x, *w; float *y; int R, H, ldx, ldy; float eps; } Norm;

INLINE void norm_row(const float *x, const float *w, float *y, int H, float eps) {
    vf s = splat(0);
    for (int i = 0; i < H; i += LANES) { vf v = load_f32(x + i); s = fma_add(v, v, s); }
    vf scale = splat(1.0f / sqrtf(hsum(s) / (float)H + eps));
    for (int i = 0; i < H; i += LANES) *(vf *)(y + i) = load_f32(x + i) * scale * load_f32(w + i);
}

static void norm_run(void *arg, int chunk, int chunks) {
    const Norm *t = arg;
    for (int r = t->R * chunk / chunks; r < t->R * (chunk + 1) / chunks; r++)
        norm_row(t->x + (size_t)r * t->ldx, t->w, t->y + (size_t)r * t->ldy, t->H, t->eps);
}

/* Few rows cost less than waking a thread. */
static void maybe_parallel(Pool *pool, task_fn fn, void *arg, long work) {
    pd_parallel(pool, fn, arg, work < 16384 ? 1 : 4 * pd_threads(pool));
}

/* H is a multiple of 16 (checked in Python). ldx, ldy: strides between rows. */
void pd_rms_norm(Pool *pool, const float *x, int ldx, const float *w, float *y, int ldy, int R, int H, float eps) {
    Norm t = {x, w, y, R, H, ldx, ldy, eps};
    maybe_parallel(pool, norm_run, &t, (long)R * H);
}

typedef struct { const float *gu; float *y; int R, I; } Silu;

static void silu_run(void *arg, int chunk, int chunks) {
    const Silu *t = arg;
    for (int r = t->R * chunk / chunks; r < t->R * (chunk + 1) / chunks; r++) {
        const float *g = t->gu + (size_t)r * 2 * t->I, *u = g + t->I;
        float *y = t->y + (size_t)r * t->I;
        for (int i = 0; i < t->I; i += LANES) {
            vf x = load_f32(g + i);
            vf low = (vf)((vi)x & (x > -80.0f)) + (vf)((vi)splat(-80.0f) & (x <= -80.0f));
            *(vf *)(y + i) = x / (1.0f + vexp(-low)) * load_f32(u + i);
        }
    }
}

/* y = silu(gate) * up; gate_up is [R, 2I], I a multiple of 16. */
void pd_silu_mul(Pool *pool, const float *gate_up, float *y, int R, int I) {
    Silu t = {gate_up, y, R, I};
    maybe_parallel(pool, silu_run, &t, (long)R * I * 4);
}

typedef struct {
    float *qkv; const float *cos, *sin, *q_norm, *k_norm; const Rows *rows; const Cache *cache;
    int Hq; float eps;
} Rope;

INLINE void rotate(float *x, const float *cos, const float *sin, int D) {
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

static void store(const Cache *c, char *to, const float *from) {
    int n = c->heads * c->dim;
    if (c->bf16) for (int i = 0; i < n; i += LANES) *(vh *)((uint16_t *)to + i) = narrow(load_f32(from + i));
    else memcpy(to, from, (size_t)n * 4);
}

static void rope_run(void *arg, int chunk, int chunks) {
    const Rope *t = arg;
    const Cache *c = t->cache;
    int D = c->dim, Hk = c->heads, width = (t->Hq + 2 * Hk) * D, R = t->rows->R;
    for (int r = R * chunk / chunks; r < R * (chunk + 1) / chunks; r++) {
        float *q = t->qkv + (size_t)r * width, *k = q + t->Hq * D, *v = k + Hk * D;
        const float *cos = t->cos + (size_t)t->rows->positions[r] * (D / 2);
        const float *sin = t->sin + (size_t)t->rows->positions[r] * (D / 2);
        for (int h = 0; h < t->Hq; h++) {
            if (t->q_norm) norm_row(q + h * D, t->q_norm, q + h * D, D, t->eps);
            rotate(q + h * D, cos, sin, D);
        }
        for (int h = 0; h < Hk; h++) {
            if (t->k_norm) norm_row(k + h * D, t->k_norm, k + h * D, D, t->eps);
            rotate(k + h * D, cos, sin, D);
        }
        char *row = cache_row(c, sequence_pages(t->rows, r), t->rows->slots[r]);
        store(c, row, k);
        store(c, row + (size_t)Hk * D * (c->bf16 ? 2 : 4), v);
    }
}

/* Rotate q and k in place (half-split form) and write k, v of each row at its slot. */
void pd_rope_store(Pool *pool, float *qkv, int Hq, const float *cos, const float *sin, const float *q_norm,
                   const float *k_norm, float eps, const Rows *rows, const Cache *cache) {
    Rope t = {qkv, cos, sin, q_norm, k_norm, rows, cache, Hq, eps};
    maybe_parallel(pool, rope_run, &t, (long)rows->R * (Hq + 2 * cache->heads) * cache->dim * 4);
}
