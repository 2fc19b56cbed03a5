/* Matrix products.

   The left factor is read as rows of 32-bit words, each a float or a pair of bf16. The right factor is packed
   into panels of PANEL columns, in which the PANEL words of one row are contiguous. Both precisions then share
   all code but one instruction. Each row's sums are taken in a fixed order, independent of the number of rows:
   the bits of a lane do not depend on the other lanes.

   `depth` is the number of words that a product sums over. */

#ifndef GEMM_H
#define GEMM_H

#include "tiles.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8 };
#else
enum { TILE_ROWS = 4 };
#endif
enum { PANEL = 2 * WIDTH, BLOCK_DEPTH = 128, BLOCK_ROWS = 64, PREFETCH_ROWS = 8 };
enum { PRODUCT_ROWS = USES_TILES ? 256 : BLOCK_ROWS }; /* tiles multiply faster than panels are read from memory */

/* --- packing --- */

/* Packs a word of each column of a panel: of rows 0 and 1 for bf16, else of row 0. Rows from `num_rows` on are zero, and
   so are floats from `count` on. */
INLINE void pack_row(int is_bf16, int source_is_bf16, uint32_t *to, const void *rows, index_t stride, index_t num_rows,
                     index_t count) {
    for (index_t j = 0; j < PANEL; j += WIDTH) {
        ivec *words = (ivec *)(to + j);
        for (index_t i = is_bf16 ? 2 : 1; i > 0; i--)
            __builtin_prefetch(offset_ptr(source_is_bf16, rows, (PREFETCH_ROWS + i) * stride + j));
#ifdef __AVX512BF16__
        if (is_bf16) {
            ivec even = {}, odd = {};
            if (num_rows > 0)
                even = source_is_bf16 ? bf16_to_u32((const uint16_t *)rows + j)
                                      : round_to_bf16(load_some(rows, j, count - j));
            if (num_rows > 1)
                odd = source_is_bf16 ? bf16_to_u32((const uint16_t *)rows + stride + j)
                                     : round_to_bf16(load_some(rows, stride + j, count - j));
            *words = even | odd << 16;
            continue;
        }
#endif
        *words = num_rows > 0 ? (ivec)load_some(rows, j, count - j) : (ivec){};
    }
}

/* Packs a matrix (rows, columns) for a product that sums over its rows: `count` words of each panel from `first` on.
   Floats from `stride` on are zero. */
INLINE void pack_rows(int is_bf16, int source_is_bf16, uint32_t *to, const void *matrix, index_t stride, index_t rows,
                      index_t columns, index_t depth, index_t first, index_t count) {
    index_t step = is_bf16 ? 2 : 1;
    for (index_t k = first; k < first + count; k++)
        for (index_t j = 0; j < columns; j += PANEL)
            pack_row(is_bf16, source_is_bf16, to + j * depth + k * PANEL,
                     offset_ptr(source_is_bf16, matrix, k * step * stride + j), stride, rows - k * step, stride - j);
}

/* Packs a matrix (columns, inner) of floats for a product that sums over `inner`; pads the panels of `count` columns and
   the words up to `depth` with zeros. */
INLINE void pack_columns(int is_bf16, uint32_t *to, const float *matrix, index_t columns, index_t inner, index_t depth,
                         index_t count) {
    uint32_t words[PANEL][WIDTH];
    index_t step = is_bf16 ? 2 : 1;
    for (; count > 0; count -= PANEL, columns -= PANEL, matrix += PANEL * inner)
        for (index_t k = 0; k < depth; k += WIDTH) {
            for (index_t j = 0; j < PANEL; j++)
                for (index_t i = 0; i < step * WIDTH; i += WIDTH) {
                    __builtin_prefetch(matrix + (j + PANEL) * inner + step * k + i); /* for the next panel */
                    store(is_bf16, words[j], i,
                          load_some(matrix, j * inner + step * k + i, j < columns ? inner - step * k - i : 0));
                }
            for (index_t i = 0; i < WIDTH && k + i < depth; i++, to += PANEL)
                for (index_t j = 0; j < PANEL; j++) to[j] = words[j][i];
        }
}

/* The words that a product sums over, at least: whole tiles if it uses them. Those from `depth` on are zero. */
INLINE index_t pad_depth(int is_bf16, index_t depth) {
    index_t multiple = is_bf16 ? TILE : 1;
    return (depth + multiple - 1) / multiple * multiple;
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

/* sums (rows, vectors * WIDTH) = a (rows, depth) times a panel, plus the previous sums if `accumulate`, plus the bias if
   it is not NULL; all in registers.
   Prefetches what follows the panel, an eighth of its size. */
INLINE void micro_kernel(int is_bf16, const int rows, const int vectors, const uint32_t *a, index_t row_stride,
                         index_t word_stride, const uint32_t *panel, index_t depth, const uint32_t *next, float *sums,
                         index_t stride, int accumulate, const float *bias) {
    vec sum[TILE_ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = accumulate ? *(vec *)(sums + i * stride + j * WIDTH) : (vec){};
    for (index_t k = 0; k < depth; k++, panel += PANEL, next += PANEL / 8) {
        vec left = *(const vec *)panel, right = vectors > 1 ? *(const vec *)(panel + WIDTH) : left;
        __builtin_prefetch(next);
        for (int i = 0; i < rows; i++) {
            uint32_t word = a[i * row_stride + k * word_stride];
            sum[i][0] = fma_words(is_bf16, word, left, sum[i][0]);
            if (vectors > 1) sum[i][1] = fma_words(is_bf16, word, right, sum[i][1]);
        }
    }
    for (int j = 0; j < vectors; j++) {
        vec x = bias ? load(0, bias, j * WIDTH) : (vec){};
        for (int i = 0; i < rows; i++) *(vec *)(sums + i * stride + j * WIDTH) = bias ? sum[i][j] + x : sum[i][j];
    }
}

#ifdef __AMX_BF16__
/* gemm_panel with tiles, in blocks of rows that are as equal as possible: few need other sizes of the tiles. If the stride
   of the words is not 1, `a` is a panel whose tiles were transposed, as in the gradient of a weight. Its right factor, unlike
   a weight, is in the L2 cache already, so that nothing is prefetched. */
INLINE void gemm_tiles(index_t rows, index_t columns, const uint32_t *a, index_t row_stride, index_t word_stride,
                       const uint32_t *panel, index_t depth, float *sums, index_t stride, int accumulate,
                       const float *bias) {
    index_t a_stride = word_stride == 1 ? row_stride : word_stride;
    index_t second_row = word_stride == 1 ? TILE * row_stride : TILE, next_tile = TILE * word_stride;
    index_t num_blocks = (rows + 2 * TILE - 1) / (2 * TILE), block = (rows + num_blocks - 1) / num_blocks;
    index_t max_depth = num_blocks > 1 ? BLOCK_DEPTH : depth;
    index_t prefetched = word_stride == 1 ? TILE * PANEL / num_blocks : 0;
    for (index_t k = 0; k < depth; k += max_depth, accumulate = 1) {
        index_t block_depth = depth - k < max_depth ? depth - k : max_depth;
        const uint32_t *words = panel + k * PANEL, *next = words + block_depth * PANEL;
        for (index_t i = 0; i < rows; i += block, next += block_depth / TILE * prefetched) {
            index_t block_rows = rows - i < block ? rows - i : block;
            const float *start = accumulate ? sums + i * stride : bias;
#define MULTIPLY(two_rows, two_columns)                                                                            \
    multiply_tiles(two_rows, two_columns, a + i * row_stride + k * word_stride, a_stride, second_row, next_tile,   \
                   words, PANEL, block_depth, next, prefetched, start, accumulate ? stride : 0, sums + i * stride, \
                   stride)
            configure_tiles(block_rows);
            if (block_rows > TILE && columns > WIDTH) MULTIPLY(1, 1);
            if (block_rows > TILE && columns <= WIDTH) MULTIPLY(1, 0);
            if (block_rows <= TILE && columns > WIDTH) MULTIPLY(0, 1);
            if (block_rows <= TILE && columns <= WIDTH) MULTIPLY(0, 0);
#undef MULTIPLY
        }
    }
}
#endif

/* The same as micro_kernel for any number of rows and any depth, in blocks of the panel that fit the L1 cache. Columns:
   1 … PANEL, of which WIDTH or PANEL are written. */
INLINE void gemm_panel(int is_bf16, index_t rows, index_t columns, const void *a, index_t row_stride,
                       index_t word_stride, const uint32_t *panel, index_t depth, float *sums, index_t stride,
                       int accumulate, const float *bias) {
#ifdef __AMX_BF16__
    if (is_bf16) {
        gemm_tiles(rows, columns, a, row_stride, word_stride, panel, depth, sums, stride, accumulate, bias);
        return;
    }
#endif
#define MICRO_KERNEL(rows, vectors)                                                                                \
    micro_kernel(is_bf16, rows, vectors, words + i * row_stride, row_stride, word_stride, block, block_depth,      \
                 block + block_depth * (PANEL + i * PANEL / 8 / TILE_ROWS), sums + i * stride, stride, accumulate, \
                 k + BLOCK_DEPTH < depth ? NULL : bias)
    for (index_t k = 0; k < depth; k += BLOCK_DEPTH, accumulate = 1) {
        index_t block_depth = depth - k < BLOCK_DEPTH ? depth - k : BLOCK_DEPTH, i = 0;
        const uint32_t *words = (const uint32_t *)a + k * word_stride, *block = panel + k * PANEL;
        for (; columns <= WIDTH && i + TILE_ROWS <= rows; i += TILE_ROWS) MICRO_KERNEL(TILE_ROWS, 1);
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS) MICRO_KERNEL(TILE_ROWS, 2);
        for (; TILE_ROWS > 4 && i + 4 <= rows; i += 4) MICRO_KERNEL(4, 2);
        for (; i + 2 <= rows; i += 2) MICRO_KERNEL(2, 2);
        for (; i < rows; i++) MICRO_KERNEL(1, 2);
    }
#undef MICRO_KERNEL
}

#endif
