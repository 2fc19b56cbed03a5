/* Products with a packed right factor, row by row; shared by the linear layer, the loss and the decoder. */

#ifndef LINEAR_H
#define LINEAR_H

#include "gemm.h"

typedef struct {
    const void *left;                    /* (rows, left_stride words) */
    const uint32_t *packed;              /* the right factor */
    const float *bias;                   /* (columns), or NULL */
    index_t left_stride, depth, columns; /* columns: a multiple of PANEL */
} packed_product;

/* out (count, columns) = rows of the left factor times the right one + bias; at most PRODUCT_ROWS rows. */
INLINE void product_rows(int is_bf16, int out_is_bf16, const packed_product *p, index_t first, index_t count,
                         void *out) {
    float sums[PRODUCT_ROWS * PANEL] __attribute__((aligned(64)));
    index_t N = p->columns, depth = p->depth;
    for (index_t n = 0; n < N; n += PANEL) {
        gemm_panel(is_bf16, count, PANEL, (const uint32_t *)p->left + first * p->left_stride, p->left_stride, 1,
                   p->packed + n * depth, depth, sums, PANEL, 0, NULL);
        vec bias_left = {}, bias_right = {};
        if (p->bias) bias_left = load(0, p->bias, n), bias_right = load(0, p->bias, n + WIDTH);
        for (index_t i = 0; i < count; i++) {
            store(out_is_bf16, out, i * N + n, load(0, sums, i * PANEL) + bias_left);
            store(out_is_bf16, out, i * N + n + WIDTH, load(0, sums, i * PANEL + WIDTH) + bias_right);
        }
    }
}

/* A weight of floats (rows, stride), as the right factor (depth words, columns) of a product, or transposed. The rows of
   each gate become as many words or columns as those of the others; what the weight lacks is zero. */
typedef struct {
    int is_bf16, transposed;
    index_t gates;
    const float *weight;
    index_t rows, stride, depth, columns;
    uint32_t *packed;
} packing;

void pack_weight(const packing *weight, index_t num_threads);

#endif
