/* Vectors of floats: loading and storing float or bf16, exp, tanh, sigmoid, division. */

#ifndef VECTOR_H
#define VECTOR_H

#include <stdint.h>
#include <string.h>

#include "api.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined __AVX512F__
enum { WIDTH = 16 };
#elif defined __AVX__
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));

INLINE vec broadcast(float x) { return x - (vec){}; }

#ifdef __AVX512BF16__
INLINE ivec bf16_to_u32(const void *p) { return (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE __m256i f32_to_bf16(vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
INLINE ivec round_to_bf16(vec x) { return (ivec)_mm512_cvtepu16_epi32(f32_to_bf16(x)); }
#endif

/* WIDTH numbers from `index` on of an array of floats or bf16. */
INLINE vec load(int is_bf16, const void *array, index_t index) {
#ifdef __AVX512BF16__
    if (is_bf16) return (vec)(bf16_to_u32((const uint16_t *)array + index) << 16);
#endif
    return *(const vec *)((const float *)array + index);
}

/* The same of floats, of which `count` exist; the others are zero. */
INLINE vec load_some(const float *array, index_t index, index_t count) {
    if (count >= WIDTH) return load(0, array, index);
    vec x = {};
    if (count <= 0) return x;
#ifdef __AVX512F__
    x = (vec)_mm512_maskz_loadu_ps((__mmask16)((1 << count) - 1), array + index);
#else
    for (index_t v = 0; v < count; v++) x[v] = array[index + v];
#endif
    return x;
}

INLINE void store(int is_bf16, void *array, index_t index, vec x) {
#ifdef __AVX512BF16__
    if (is_bf16) {
        _mm256_storeu_si256((void *)((uint16_t *)array + index), f32_to_bf16(x));
        return;
    }
#endif
    *(vec *)((float *)array + index) = x;
}

/* Stores the first `count` of WIDTH floats. */
INLINE void store_some(float *array, index_t index, vec x, index_t count) {
    if (count >= WIDTH)
        store(0, array, index, x);
    else if (count > 0)
#ifdef __AVX512F__
        _mm512_mask_storeu_ps(array + index, (__mmask16)((1 << count) - 1), (__m512)x);
#else
        for (index_t v = 0; v < count; v++) array[index + v] = x[v];
#endif
}

INLINE const void *offset_ptr(int is_bf16, const void *array, index_t count) {
    return (const char *)array + count * (is_bf16 ? 2 : 4);
}

/* The larger of two; the second if one of them is NaN. */
INLINE vec vmax(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    ivec greater = a > b;
    return (vec)((greater & (ivec)a) | (~greater & (ivec)b));
#endif
}

INLINE float reduce_max(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float max = x[0];
    for (int v = 1; v < WIDTH; v++) max = x[v] > max ? x[v] : max;
    return max;
#endif
}

INLINE float reduce_add(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int v = 0; v < WIDTH; v++) sum += x[v];
    return sum;
#endif
}

/* a / b. The processor's reciprocal estimate has a relative error of 1e-4, enough for bf16. One Newton step
   reduces it to 1e-7, in half the time of a division. */
INLINE vec vdivide(int is_bf16, vec a, vec b) {
#ifdef __AVX512F__
    vec estimate = (vec)_mm512_rcp14_ps((__m512)b), quotient = a * estimate;
    return is_bf16 ? quotient : quotient + estimate * (a - quotient * b);
#else
    return a / b;
#endif
}

/* exp(x) = 2^n exp(r). Returns exp(r) - 1 with a relative error of 1e-7 and stores 2^n in `power`, so that
   exp(x) - 1 = power * result + (power - 1). */
INLINE vec expm1_parts(vec x, vec *power) {
    vec n = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer, held in the last bits */
    *power = (vec)(((ivec)n + 127) << 23);
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    vec p = (broadcast(1.9841270e-4f) * r + 1.3888889e-3f) * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    return p * r * r + r;
}

/* Relative error 1e-7; for bf16 1.2e-4, a sixteenth of its last bit, by a rational function. */
INLINE vec vtanh(int is_bf16, vec x) {
    if (is_bf16) {
        x = -vmax(broadcast(-4.97f), -vmax(broadcast(-4.97f), x));
        vec y = x * x, numerator = (y * 6.7345327e-4f + 1.02510300e-1f) * y + 0.99994979f;
        return vdivide(1, x * numerator, (y * 1.28483914e-2f + 4.35534239e-1f) * y + 1);
    }
    ivec sign = (ivec)x & INT32_MIN; /* (1 - exp(-2|x|)) / (1 + exp(-2|x|)), with the sign of x */
    vec power, rest = expm1_parts(vmax(broadcast(-40), -2 * (vec)((ivec)x ^ sign)), &power);
    vec e = power * rest + (power - 1);
    return (vec)((ivec)vdivide(0, -e, e + 2) | sign);
}

/* As accurate as vtanh. */
INLINE vec sigmoid(int is_bf16, vec x) {
#ifdef __AVX512BF16__
    if (is_bf16) {
        vec t = x * -1.44269504f, r = (vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        vec p = ((broadcast(7.80235e-2f) * r + 2.26067824e-1f) * r + 6.95833713e-1f) * r + 0.99992515f;
        return vdivide(1, broadcast(1), (vec)_mm512_scalef_ps((__m512)p, (__m512)t) + 1);
    }
#endif
    vec power, rest = expm1_parts(-vmax(broadcast(-80), -vmax(broadcast(-80), -x)), &power);
    return vdivide(0, broadcast(1), power * rest + power + 1);
}

#endif
