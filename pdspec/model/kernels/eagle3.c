/* The EAGLE-3 draft layer in one call; pdspec/spec/eagle3/head.py spells out the same steps.
 *
 * All R rows write their KV; only the rows named in ``wanted`` go on to attention and MLP. */
#include "operations.h"
#include <stdlib.h>

typedef struct {
    int32_t H, Hq, Hk, D, I, bf16;
    float eps;
    const float *cos, *sin;
    const void *embedding, *qkv, *o, *gate_up, *down; /* packed */
    const float *input_norm, *hidden_norm, *post_norm;
} Eagle3;

/* The rows of a batch that are named, in this order; memory of 4 + A numbers for each. */
static Rows pick(const Rows *rows, const int32_t *wanted, int count, int32_t *memory) {
    int32_t *positions = memory, *sequence = positions + count, *slots = sequence + count, *prefix = slots + count;
    int32_t *ancestors = prefix + count;
    for (int i = 0; i < count; i++) {
        int r = wanted[i];
        positions[i] = rows->positions[r];
        sequence[i] = rows->sequence[r];
        slots[i] = rows->slots[r];
        prefix[i] = rows->prefix_len[r];
        memcpy(ancestors + (size_t)i * rows->A, rows->ancestors + (size_t)r * rows->A, sizeof(int32_t) * (size_t)rows->A);
    }
    return (Rows){count, rows->P, rows->A, positions, sequence, slots, prefix, ancestors, rows->page_table};
}

/* out [count, H] from features [R, H] and the next tokens [R]. Returns 0, or -1 without memory. */
int pd_eagle3(Pool *pool, const Eagle3 *m, const Rows *rows, const Cache *cache, const int32_t *tokens,
              const float *features, const int32_t *wanted, int count, float *out) {
    const int R = rows->R, H = m->H, width = (m->Hq + 2 * m->Hk) * m->D, most = R > count ? R : count;
    const size_t per_row = (size_t)(H + 2 * H + 2 * width + m->Hq * m->D + H + 2 * m->I + m->I + 4 + rows->A);
    float *memory = malloc(per_row * (size_t)most * sizeof(float));
    if (!memory) return -1;
    float *embedded = memory, *x = embedded + (size_t)R * H, *qkv = x + (size_t)R * 2 * H, *q = qkv + (size_t)R * width;
    float *attended = q + (size_t)count * width, *norm = attended + (size_t)count * m->Hq * m->D;
    float *gate_up = norm + (size_t)count * H, *act = gate_up + (size_t)count * 2 * m->I;
    pd_embed(m->embedding, m->bf16, H, tokens, R, embedded);
    pd_rms_norm(pool, embedded, H, m->input_norm, x, 2 * H, R, H, m->eps);
    pd_rms_norm(pool, features, H, m->hidden_norm, x + H, 2 * H, R, H, m->eps);
    pd_linear(pool, x, 2 * H, m->qkv, m->bf16, NULL, qkv, width, R, width, 2 * H, 0);
    pd_rope_store(pool, qkv, m->Hq, m->cos, m->sin, NULL, NULL, m->eps, rows, cache);
    Rows some = pick(rows, wanted, count, (int32_t *)(act + (size_t)count * m->I));
    for (int i = 0; i < count; i++) {
        memcpy(q + (size_t)i * width, qkv + (size_t)wanted[i] * width, sizeof(float) * (size_t)width);
        memcpy(out + (size_t)i * H, features + (size_t)wanted[i] * H, sizeof(float) * (size_t)H);
    }
    int status = count ? pd_attend(pool, q, width, m->Hq, attended, &some, cache) : 0;
    if (count && !status) {
        pd_linear(pool, attended, m->Hq * m->D, m->o, m->bf16, NULL, out, H, count, H, m->Hq * m->D, 1);
        pd_rms_norm(pool, out, H, m->post_norm, norm, H, count, H, m->eps);
        pd_linear(pool, norm, H, m->gate_up, m->bf16, NULL, gate_up, 2 * m->I, count, 2 * m->I, H, 0);
        pd_silu_mul(pool, gate_up, act, count, m->I);
        pd_linear(pool, act, m->I, m->down, m->bf16, NULL, out, H, count, H, m->I, 1);
    }
    free(memory);
    return status;
}
