/* The hash keys of dropout masks: the first four bytes of BLAKE2b (RFC 7693) of a text that names seed, step, layer and
   lane. A text has a single block, and a vector holds the same word of several lanes. */

#include <stdio.h>
#include <string.h>

#include "api.h"

enum { NUM_LANES = 8, BLOCK_BYTES = 128, DIGEST_BYTES = 4, ROUNDS = 12 };

typedef uint64_t words __attribute__((vector_size(8 * NUM_LANES)));

static const uint64_t IV[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

static const uint8_t SIGMA[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

#define ROTATE(x, bits) ((x) >> (bits) | (x) << (64 - (bits)))

static void mix(words *v, int a, int b, int c, int d, words x, words y) {
    v[a] += v[b] + x;
    v[d] = ROTATE(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = ROTATE(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = ROTATE(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = ROTATE(v[b] ^ v[c], 63);
}

/* The first word of each lane's digest, for texts of `length` bytes. */
static words hash(const words *text, words length) {
    words v[16];
    for (int i = 0; i < 16; i++) v[i] = IV[i % 8] - (words){};
    v[0] ^= 0x01010000 ^ DIGEST_BYTES;
    words initial = v[0];
    v[12] ^= length;
    v[14] = ~v[14]; /* the last block */
    for (int round = 0; round < ROUNDS; round++) {
        const uint8_t *s = SIGMA[round % 10];
        for (int i = 0; i < 4; i++) mix(v, i, 4 + i, 8 + i, 12 + i, text[s[2 * i]], text[s[2 * i + 1]]);
        for (int i = 0; i < 4; i++)
            mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, text[s[8 + 2 * i]], text[s[9 + 2 * i]]);
    }
    return initial ^ v[0] ^ v[8];
}

/* Appends the decimal digits of a number; returns their end. */
static char *append_number(char *to, index_t number) {
    char digits[20];
    int count = 0;
    do digits[count++] = (char)('0' + number % 10);
    while (number /= 10);
    while (count) *to++ = digits[--count];
    return to;
}

int dropout_keys(const DropoutKeysArgs *args) {
    char prefix[BLOCK_BYTES];
    int prefix_length = snprintf(prefix, sizeof prefix, "%ld %ld %ld ", args->seed, args->step, args->layer);
    for (index_t first = 0; first < args->lanes; first += NUM_LANES) {
        words text[BLOCK_BYTES / 8] = {}, length;
        for (index_t lane = 0; lane < NUM_LANES; lane++) {
            uint64_t block[BLOCK_BYTES / 8] = {};
            memcpy(block, prefix, prefix_length);
            char *end = append_number((char *)block + prefix_length, args->first_lane + first + lane);
            length[lane] = end - (char *)block;
            for (int i = 0; i * 8 < end - (char *)block; i++) text[i][lane] = block[i];
        }
        words digest = hash(text, length);
        for (index_t lane = 0; lane < NUM_LANES && first + lane < args->lanes; lane++)
            args->keys[first + lane] = (int32_t)digest[lane];
    }
    return OK;
}
