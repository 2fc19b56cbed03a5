/* What one core can do: products added to sums that stay in its registers, and a copy through memory. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined __AVX512F__
enum { WIDTH = 16, SUMS = 16 };
#elif defined __AVX__
enum { WIDTH = 8, SUMS = 12 };
#else
enum { WIDTH = 4, SUMS = 12 };
#endif

#if defined __x86_64__
#define UNKNOWN(x) __asm__ volatile("" : "+v"(x)) /* a number that the compiler knows nothing of */
#else
#define UNKNOWN(x) __asm__ volatile("" : "+w"(x))
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));

/* Operations done in `turns`: the sums differ, so that all must be done. */
double multiply_floats(long turns) {
    vec sum[SUMS] = {}, x = {};
    for (int i = 0; i < SUMS; i++) UNKNOWN(sum[i]);
    for (long t = 0; t < turns; t++) {
        for (int i = 0; i < SUMS; i++) sum[i] += x * x;
        UNKNOWN(x);
    }
    for (int i = 0; i < SUMS; i++) UNKNOWN(sum[i]);
    return 2.0 * turns * SUMS * WIDTH;
}

/* As before, of pairs of bf16; 0 where the processor has no such instruction. */
double multiply_bf16(long turns) {
#ifdef __AVX512BF16__
    __m512 sum[SUMS];
    __m512bh x = (__m512bh)_mm512_setzero_si512();
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_setzero_ps();
    for (int i = 0; i < SUMS; i++) UNKNOWN(sum[i]);
    for (long t = 0; t < turns; t++) {
        for (int i = 0; i < SUMS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
        UNKNOWN(x);
    }
    for (int i = 0; i < SUMS; i++) UNKNOWN(sum[i]);
    return 4.0 * turns * SUMS * WIDTH;
#else
    return 0.0 * turns;
#endif
}

/* As before, of tiles of AMX, which the process must have been permitted to use. */
double multiply_tiles(long turns) {
#ifdef __AMX_BF16__
    enum { TILE = 16 };
    const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } sizes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("" ::"m"(sizes));
    _tile_loadconfig(&sizes);
    for (long t = 0; t < turns; t++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 4.0 * turns * 2 * TILE * TILE * 2 * TILE;
#else
    return 0.0 * turns;
#endif
}

/* Bytes read and written. */
double copy(char *to, const char *from, long size) {
    memcpy(to, from, size);
    return 2.0 * size;
}
