/* Matrix products.

   The left factor is read as rows of 32-bit words, each a float or a pair of bf16. The right factor is packed
   into panels of PANEL columns, in which the PANEL words of one row are contiguous. Both precisions then share
   all code but one instruction. Each row's sums are taken in a fixed order, independent of the number of rows:
   the bits of a lane do not depend on the other lanes.

   `depth` is the number of words that a product sums over. */

#ifndef GEMM_H
#define GEMM_H

#include "vector.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8 };
#else
enum { TILE_ROWS = 4 };
#endif
enum { PANEL = 2 * WIDTH, BLOCK_DEPTH = 128, BLOCK_ROWS = 64 };

/* --- packing --- */

/* Packs one row of words: rows 2k and 2k + 1 interleaved for bf16, else row k. Rows from `num_rows` on are zero, and so
   are columns of floats from `stride` on. */
INLINE void pack_row(int is_bf16, int source_is_bf16, uint32_t *to, const void *rows, index_t stride, index_t num_rows,
                     index_t columns, index_t depth) {
    for (index_t j = 0; j < columns; j += WIDTH) {
        ivec *words = (ivec *)(to + (j / PANEL * depth) * PANEL + j % PANEL);
#ifdef __AVX512BF16__
        if (is_bf16) {
            ivec even = {}, odd = {};
            if (num_rows > 0)
                even = source_is_bf16 ? bf16_to_u32((const uint16_t *)rows + j)
                                      : round_to_bf16(load_some(rows, j, stride - j));
            if (num_rows > 1)
                odd = source_is_bf16 ? bf16_to_u32((const uint16_t *)rows + stride + j)
                                     : round_to_bf16(load_some(rows, stride + j, stride - j));
            *words = even | odd << 16;
            continue;
        }
#endif
        *words = num_rows > 0 ? (ivec)load_some(rows, j, stride - j) : (ivec){};
    }
}

/* Packs a matrix (rows, columns) for a product that sums over its rows. */
INLINE void pack_rows(int is_bf16, int source_is_bf16, uint32_t *to, const void *matrix, index_t stride, index_t rows,
                      index_t columns, index_t depth) {
    index_t step = is_bf16 ? 2 : 1;
    for (index_t k = 0; k < depth; k++)
        pack_row(is_bf16, source_is_bf16, to + k * PANEL, offset_ptr(source_is_bf16, matrix, k * step * stride), stride,
                 rows - k * step, columns, depth);
}

/* Packs a matrix (columns, inner) of floats for a product that sums over `inner`; pads the last panel and the words up to
   `depth` with zeros. `scratch` holds depth * PANEL words, and is used for bf16 only. */
INLINE void pack_columns(int is_bf16, uint32_t *to, const float *matrix, index_t columns, index_t inner, index_t depth,
                         uint32_t *scratch) {
    index_t row_words = is_bf16 ? depth : inner;
    for (index_t panel = 0; panel < columns; panel += PANEL, to += depth * PANEL) {
        const uint32_t *words = (const uint32_t *)(matrix + panel * inner);
        index_t width = columns - panel < PANEL ? columns - panel : PANEL;
        if (is_bf16) {
            for (index_t j = 0; j < width; j++)
                for (index_t i = 0; i < 2 * depth; i += WIDTH)
                    store(1, scratch, 2 * j * depth + i, load_some(matrix, (panel + j) * inner + i, inner - i));
            words = scratch;
        }
        for (index_t k = 0; k < depth; k++)
            for (index_t j = 0; j < PANEL; j++)
                to[k * PANEL + j] = j < width && k < row_words ? words[j * row_words + k] : 0;
    }
}

/* --- products --- */

/* Adds the product of words to a sum: of two floats, or of two pairs of bf16. */
INLINE vec fma_words(int is_bf16, uint32_t a, vec b, vec sum) {
#ifdef __AVX512BF16__
    if (is_bf16) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    float x;
    memcpy(&x, &a, 4);
    return sum + x * b;
}

/* sums (rows, PANEL) = a (rows, depth) times a panel, plus the previous sums if `accumulate`; all in registers. */
INLINE void micro_kernel(int is_bf16, const int rows, const uint32_t *a, index_t row_stride, index_t word_stride,
                         const uint32_t *panel, index_t depth, float *sums, index_t stride, int accumulate) {
    vec sum[TILE_ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = accumulate ? *(vec *)(sums + i * stride + j * WIDTH) : (vec){};
    for (index_t k = 0; k < depth; k++, panel += PANEL) {
        vec left = *(const vec *)panel, right = *(const vec *)(panel + WIDTH);
        for (int i = 0; i < rows; i++) {
            uint32_t word = a[i * row_stride + k * word_stride];
            sum[i][0] = fma_words(is_bf16, word, left, sum[i][0]);
            sum[i][1] = fma_words(is_bf16, word, right, sum[i][1]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) *(vec *)(sums + i * stride + j * WIDTH) = sum[i][j];
}

/* The same for any number of rows and any depth, in blocks of the panel that fit the L1 cache. */
INLINE void gemm_panel(int is_bf16, index_t rows, const void *a, index_t row_stride, index_t word_stride,
                       const uint32_t *panel, index_t depth, float *sums, index_t stride, int accumulate) {
#define MICRO_KERNEL(rows)                                                                           \
    micro_kernel(is_bf16, rows, words + i * row_stride, row_stride, word_stride, block, block_depth, \
                 sums + i * stride, stride, accumulate)
    for (index_t k = 0; k < depth; k += BLOCK_DEPTH, accumulate = 1) {
        index_t block_depth = depth - k < BLOCK_DEPTH ? depth - k : BLOCK_DEPTH, i = 0;
        const uint32_t *words = (const uint32_t *)a + k * word_stride, *block = panel + k * PANEL;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS) MICRO_KERNEL(TILE_ROWS);
        for (; TILE_ROWS > 4 && i + 4 <= rows; i += 4) MICRO_KERNEL(4);
        for (; i + 2 <= rows; i += 2) MICRO_KERNEL(2);
        for (; i < rows; i++) MICRO_KERNEL(1);
    }
#undef MICRO_KERNEL
}

#endif
