/* Products of bf16 by the matrix unit of Intel's processors since Sapphire Rapids (AMX). Its eight registers, the tiles,
   hold up to 16 rows of 16 words each.

   One instruction adds the products of 16 words of up to 16 rows with 16 columns to a tile of floats. Each row's sums are
   taken in a fixed order, as in gemm.h, but in another one than there.
   Source: Intel, "Intel 64 and IA-32 Architectures Optimization Reference Manual", the chapter on AMX. */

#ifndef TILES_H
#define TILES_H

#include "vector.h"

#ifdef __AMX_BF16__
enum { TILE = 16, USES_TILES = 1 };

/* Sets the sizes of this thread's tiles for products of 1 … 2 * TILE rows. */
void configure_tiles(index_t rows);

/* Clears this thread's tiles, which the system would save whenever it interrupts the thread. */
void release_tiles(void);

/* sums (rows, 1 or 2 tiles of columns) = a (rows, depth) times a panel, plus `start`, whose rows are `start_stride` apart,
   unless it is NULL. The depth is a multiple of TILE. A tile of `a` starts at a multiple of `second_row`, which is where
   the rows from TILE on are, plus a multiple of `next_tile`, where the next words are. `prefetched` words from `next` on
   are prefetched into the L2 cache for each of its tiles. */
INLINE void multiply_tiles(const int two_rows, const int two_columns, const uint32_t *a, index_t row_stride,
                           index_t second_row, index_t next_tile, const uint32_t *panel, index_t panel_width,
                           index_t depth, const uint32_t *next, index_t prefetched, const float *start,
                           index_t start_stride, float *sums, index_t stride) {
    index_t row_bytes = row_stride * 4, panel_bytes = panel_width * 4, sum_bytes = stride * 4;
    __asm__ volatile("" ::: "memory"); /* gcc's intrinsics do not declare what memory they read */
    if (start) {
        const float *second = start + TILE * start_stride;
        _tile_loadd(0, start, start_stride * 4);
        if (two_columns) _tile_loadd(1, start + TILE, start_stride * 4);
        if (two_rows) _tile_loadd(2, second, start_stride * 4);
        if (two_rows && two_columns) _tile_loadd(3, second + TILE, start_stride * 4);
    } else {
        _tile_zero(0);
        if (two_columns) _tile_zero(1);
        if (two_rows) _tile_zero(2);
        if (two_rows && two_columns) _tile_zero(3);
    }
    for (index_t k = 0; k < depth; k += TILE, a += next_tile, panel += TILE * panel_width) {
        _tile_loadd(4, a, row_bytes);
        _tile_loadd(6, panel, panel_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) _tile_loadd(7, panel + TILE, panel_bytes);
        if (two_columns) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_loadd(5, a + second_row, row_bytes);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
        for (const uint32_t *end = next + prefetched; next < end; next += TILE) __builtin_prefetch(next, 0, 2);
    }
    _tile_stored(0, sums, sum_bytes);
    if (two_columns) _tile_stored(1, sums + TILE, sum_bytes);
    if (two_rows) _tile_stored(2, sums + TILE * stride, sum_bytes);
    if (two_rows && two_columns) _tile_stored(3, sums + TILE * stride + TILE, sum_bytes);
}

/* Transposes TILE rows of TILE words, `stride` apart, in their place. */
INLINE void transpose_tile(uint32_t *words, index_t stride) {
    ivec row[TILE];
    for (int i = 0; i < TILE; i++) row[i] = *(ivec *)(words + i * stride);
    for (int half = TILE / 2; half > 0; half /= 2) {
        ivec upper, lower; /* swaps two quarters of each square of 2 * half words */
        for (int j = 0; j < TILE; j++) {
            upper[j] = j & half ? TILE + j - half : j;
            lower[j] = j & half ? TILE + j : j + half;
        }
        for (int i = 0; i < TILE; i++) {
            if (i & half) continue;
            __m512i a = (__m512i)row[i], b = (__m512i)row[i + half];
            row[i] = (ivec)_mm512_permutex2var_epi32(a, (__m512i)upper, b);
            row[i + half] = (ivec)_mm512_permutex2var_epi32(a, (__m512i)lower, b);
        }
    }
    for (int i = 0; i < TILE; i++) *(ivec *)(words + i * stride) = row[i];
}

/* Transposes each tile of a left factor that was packed as panels of `width` columns. */
INLINE void transpose_tiles(uint32_t *panels, index_t columns, index_t width, index_t depth) {
    for (index_t j = 0; j < columns; j += TILE)
        for (index_t k = 0; k < depth; k += TILE)
            transpose_tile(panels + j / width * width * depth + j % width + k * width, width);
}
#else
enum { TILE = 1, USES_TILES = 0 };

static inline void release_tiles(void) {}
INLINE void transpose_tiles(uint32_t *panels, index_t columns, index_t width, index_t depth) {}
#endif

#endif
