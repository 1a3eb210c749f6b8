/* What the decoder and the draft layer are made of. */
#pragma once
#include "layout.h"

void pd_rms_norm(Pool *, const float *x, int ldx, const float *w, float *y, int ldy, int R, int H, float eps);
void pd_linear(Pool *, const float *x, int ldx, const void *w, int bf16, const float *bias, float *y, int ldy, int R, int N,
               int K, int add);
void pd_embed(const void *w, int bf16, int K, const int32_t *ids, int R, float *y);
void pd_rope_store(Pool *, float *qkv, int Hq, const float *cos, const float *sin, const float *q_norm,
                   const float *k_norm, float eps, const Rows *, const Cache *);
int pd_attend(Pool *, const float *q, int ldq, int Hq, float *out, const Rows *, const Cache *);
void pd_silu_mul(Pool *, const float *gate_up, float *y, int R, int I);
