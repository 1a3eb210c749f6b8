/* A run of decoder layers (Llama family) over one batch in one call: Python is left once per step, not once per
 * operation. x is the residual stream [R, H], updated in place. */
#include "pdk.h"
#include "operations.h"

typedef struct {
    const void *qkv, *o, *gate_up, *down; /* packed */
    const float *qkv_bias, *input_norm, *post_norm, *q_norm, *k_norm; /* biases and q/k norms may be NULL */
} Layer;

typedef struct {
    int32_t H, Hq, Hk, D, I, bf16;
    float eps;
    const float *cos, *sin;
    const Layer *layers;
} Model;

typedef struct { float *norm, *qkv, *attn, *gate_up, *act; } Scratch; /* [R, H], [R, (Hq+2Hk)D], [R, HqD], [R, 2I], [R, I] */

int pd_layers(Pool *pool, const Model *m, const Rows *rows, const Cache *caches, float *x, const Scratch *s, int first, int last) {
    int R = rows->R, width = (m->Hq + 2 * m->Hk) * m->D;
    for (int l = first; l < last; l++) {
        const Layer *w = &m->layers[l];
        pd_rms_norm(pool, x, m->H, w->input_norm, s->norm, m->H, R, m->H, m->eps);
        pd_linear(pool, s->norm, m->H, w->qkv, m->bf16, w->qkv_bias, s->qkv, width, R, width, m->H, 0);
        pd_rope_store(pool, s->qkv, m->Hq, m->cos, m->sin, w->q_norm, w->k_norm, m->eps, rows, &caches[l]);
        if (pd_attend(pool, s->qkv, width, m->Hq, s->attn, rows, &caches[l])) return -1;
        pd_linear(pool, s->attn, m->Hq * m->D, w->o, m->bf16, NULL, x, m->H, R, m->H, m->Hq * m->D, 1);
        pd_rms_norm(pool, x, m->H, w->post_norm, s->norm, m->H, R, m->H, m->eps);
        pd_linear(pool, s->norm, m->H, w->gate_up, m->bf16, NULL, s->gate_up, 2 * m->I, R, 2 * m->I, m->H, 0);
        pd_silu_mul(pool, s->gate_up, s->act, R, m->I);
        pd_linear(pool, s->act, m->I, w->down, m->bf16, NULL, x, m->H, R, m->H, m->I, 1);
    }
    return 0;
}
