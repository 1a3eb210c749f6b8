/* The rows of a batch and the pages of one cache layer; mirrored by ctypes structures in native.py. */
#pragma once
#include "pdk.h"

typedef struct {
    int32_t R, P, A; /* rows, page-table width, longest ancestor list */
    const int32_t *positions, *sequence, *slots, *prefix_len;
    const int32_t *ancestors;  /* [R, A], -1 pads */
    const int32_t *page_table; /* [S, P] */
} Rows;

typedef struct {
    char *data; /* [pages][page_size][k|v][heads][dim] */
    int32_t page_shift, heads, dim, bf16, parts; /* parts: 2, or 1 where a row is key and value in one */
} Cache;

INLINE const int32_t *sequence_pages(const Rows *rows, int r) {
    return rows->page_table + (size_t)rows->sequence[r] * rows->P;
}

INLINE char *cache_row(const Cache *c, const int32_t *pages, int slot) {
    size_t row = (size_t)c->parts * c->heads * c->dim * (c->bf16 ? 2 : 4);
    size_t index = ((size_t)pages[slot >> c->page_shift] << c->page_shift) + (size_t)(slot & ((1 << c->page_shift) - 1));
    return c->data + index * row;
}
