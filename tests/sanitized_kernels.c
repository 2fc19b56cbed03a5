/* Calls all kernels on many shapes, and the collectives from threads that act as processes; built with sanitizers by
   test_sanitizers.py, and with -Daligned_alloc=failing_aligned_alloc. Buffers have exactly the sizes that api.h gives.
   Results on several threads must equal those on one, sums over ranks must be exact, and a kernel without memory must
   return that. Ends with status 1 if one is not. */

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"

enum { MAX_BUFFERS = 128 };
static const index_t THREADS[] = {1, 2, 3, 7};
static void *buffers[MAX_BUFFERS];
static int num_buffers;

static void check(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "failed: %s\n", what);
    exit(1);
}

static atomic_int allocations_left = INT_MAX;

void *failing_aligned_alloc(size_t alignment, size_t bytes) {
    void *memory = NULL;
    return atomic_fetch_sub(&allocations_left, 1) > 0 && !posix_memalign(&memory, alignment, bytes) ? memory : NULL;
}

/* Lets the n-th allocation and all later ones fail, for each n. */
#define CHECK_OUT_OF_MEMORY(call)                                     \
    for (int n = 0, status = OUT_OF_MEMORY; status != OK; n++) {      \
        atomic_store(&allocations_left, n);                           \
        status = call;                                                \
        atomic_store(&allocations_left, INT_MAX);                     \
        check(status == OUT_OF_MEMORY || (status == OK && n), #call); \
    }

static void *buffer(index_t bytes) {
    check(num_buffers < MAX_BUFFERS, "buffers");
    return buffers[num_buffers++] = malloc(bytes);
}

/* Memory for packed words. */
static void *memory(index_t bytes) {
    check(num_buffers < MAX_BUFFERS && !posix_memalign(&buffers[num_buffers], 64, bytes), "memory");
    return buffers[num_buffers++];
}

static void free_buffers(void) {
    while (num_buffers) free(buffers[--num_buffers]);
}

/* Floats in -1 … 1, or bf16. */
static void *numbers(int is_bf16, index_t count) {
    static uint32_t state = 1;
    char *data = buffer(count * (is_bf16 ? 2 : 4));
    for (index_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        float x = (float)(state >> 8) / (1 << 23) - 1;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint16_t high = bits >> 16;
        memcpy(data + i * (is_bf16 ? 2 : 4), is_bf16 ? (void *)&high : (void *)&x, is_bf16 ? 2 : 4);
    }
    return data;
}

static int64_t *tokens(index_t count, index_t vocabulary_size) {
    int64_t *data = buffer(count * 8);
    for (index_t i = 0; i < count; i++) data[i] = (i * 7 + 3) % vocabulary_size;
    return data;
}

static uint8_t *starts(index_t count) {
    uint8_t *data = buffer(count);
    for (index_t i = 0; i < count; i++) data[i] = i % 3 == 1;
    return data;
}

static index_t gates_of(index_t cell) { return cell == RNN ? 1 : cell == GRU ? 3 : 4; }

static void *copy(const void *data, index_t bytes) { return memcpy(buffer(bytes), data, bytes); }

static void run_rnn(index_t cell, int is_bf16, index_t steps, index_t lanes, index_t weight_units, index_t table_rows,
                    int full) {
    index_t units = (weight_units + 31) / 32 * 32;
    index_t size = is_bf16 ? 2 : 4, states = (steps + 1) * lanes * units, rows = steps * lanes,
            G = gates_of(cell) * units;
    index_t saved = cell == RNN ? units : 4 * units;
    int shared = cell == GRU && !is_bf16;
    RnnArgs args = {cell, is_bf16, steps, lanes, units, table_rows ? table_rows : rows, 1, weight_units};
    args.inputs = numbers(0, args.table_rows * G);
    args.tokens = table_rows ? tokens(rows, table_rows) : NULL;
    args.weight = numbers(0, gates_of(cell) * weight_units * weight_units);
    args.bias = cell == GRU ? numbers(0, units) : NULL;
    args.starts = lanes % 3 ? starts(rows) : NULL;
    args.dhidden = numbers(is_bf16, rows * units);
    args.packed = memory(G * units * size);
    void *hidden = numbers(is_bf16, states);
    float *carry = cell == RNN || shared ? NULL : numbers(0, states), *dcarry = numbers(0, lanes * units);
    char *expected = NULL, *expected_gradients = NULL;
    for (int i = 0; i < 4; i++) {
        args.num_threads = THREADS[i];
        args.hidden = copy(hidden, states * size);
        args.carry = cell == RNN ? NULL : shared ? args.hidden : copy(carry, states * 4);
        args.gates = cell == RNN || !full ? NULL : buffer(rows * 4 * units * size);
        check(rnn_forward(&args) == OK, "rnn_forward");
        expected = expected ? expected : args.hidden;
        check(!memcmp(expected, args.hidden, states * size), "rnn_forward on several threads");
        if (full) {
            args.dgates = cell == RNN ? buffer(rows * saved * size) : args.gates;
            args.dh0 = THREADS[i] == 3 ? NULL : buffer(lanes * units * 4);
            args.dcarry = cell == RNN ? NULL : copy(dcarry, lanes * units * 4);
            check(rnn_backward(&args) == OK, "rnn_backward");
            expected_gradients = expected_gradients ? expected_gradients : args.dgates;
            check(!memcmp(expected_gradients, args.dgates, rows * saved * size), "rnn_backward on several threads");
        }
    }
    if (table_rows) {
        ((int64_t *)args.tokens)[rows - 1] = table_rows;
        check(rnn_forward(&args) == INVALID_TOKEN, "a token outside the table");
    }
    free_buffers();
}

static void run_linear(int is_bf16, int out_is_bf16, int transposed, index_t gates, index_t rows, index_t inner,
                       index_t columns, index_t missing) {
    index_t weight_rows = (transposed ? columns : inner) - 5 * gates,
            weight_columns = (transposed ? inner : columns) - missing, bytes = rows * columns * (out_is_bf16 ? 2 : 4);
    LinearArgs args = {is_bf16, out_is_bf16, transposed, gates, rows, inner, columns, weight_rows, weight_columns, 1};
    args.left = numbers(is_bf16, rows * inner);
    args.weight = numbers(0, weight_rows * weight_columns);
    args.bias = transposed ? numbers(0, columns) : NULL;
    args.packed = memory(inner * columns * (is_bf16 ? 2 : 4));
    void *expected = NULL;
    for (int i = 0; i < 4; i++) {
        args.num_threads = THREADS[i], args.out = buffer(bytes);
        check(linear(&args) == OK, "linear");
        expected = expected ? expected : args.out;
        check(!memcmp(expected, args.out, bytes), "linear on several threads");
    }
    free_buffers();
}

static void run_weight_gradient(int is_bf16, index_t gates, index_t rows, index_t left_columns, index_t left_stride,
                                index_t columns, index_t out_rows, index_t out_columns) {
    WeightGradientArgs args = {is_bf16, 0, gates, rows, left_columns, left_stride, columns, out_rows, out_columns, 1};
    args.left = numbers(is_bf16, rows * left_stride);
    args.right = numbers(is_bf16, rows * columns);
    void *expected = NULL;
    for (int i = 0; i < 4; i++) {
        args.num_threads = THREADS[i], args.out = buffer(out_rows * out_columns * 4);
        check(weight_gradient(&args) == OK, "weight_gradient");
        expected = expected ? expected : args.out;
        check(!memcmp(expected, args.out, out_rows * out_columns * 4), "weight_gradient on several threads");
    }
    CHECK_OUT_OF_MEMORY(weight_gradient(&args))
    free_buffers();
}

static void run_segment_sum(int is_bf16, index_t rows, index_t columns, index_t skip_start, index_t skip_count,
                            index_t num_segments) {
    index_t stride = columns + skip_count;
    SegmentSumArgs args = {is_bf16, rows, columns, stride, num_segments, skip_start, skip_count};
    args.source = numbers(is_bf16, rows * stride);
    args.segments = num_segments > 1 ? tokens(rows, num_segments) : NULL;
    void *expected = NULL;
    for (int i = 0; i < 4; i++) {
        args.num_threads = THREADS[i], args.out = buffer(num_segments * columns * 4);
        check(segment_sum(&args) == OK, "segment_sum");
        expected = expected ? expected : args.out;
        check(!memcmp(expected, args.out, num_segments * columns * 4), "segment_sum on several threads");
    }
    free_buffers();
}

static void run_update(void) {
    const index_t sizes[] = {1, 70001, 512, 130001};
    double sums[4];
    Parameter parameters[4];
    float *gradients[4], *weights[4], *expected[4];
    for (int n = 0; n < 4; n++) gradients[n] = numbers(0, sizes[n]), weights[n] = numbers(0, sizes[n]);
    memset(gradients[3], 0, sizes[3] / 2 * 4);
    for (int i = 0; i < 4; i++) {
        for (int n = 0; n < 4; n++)
            parameters[n] = (Parameter){sizes[n], copy(gradients[n], sizes[n] * 4), copy(weights[n], sizes[n] * 4)};
        SquaresArgs squares = {4, THREADS[i], parameters, &sums[i]};
        CHECK_OUT_OF_MEMORY(sum_squares(&squares));
        check(sums[i] == sums[0] && sums[0] > 0, "sum_squares on several threads");
        check(update(&(UpdateArgs){4, THREADS[i], 0.3f, 0.7f, parameters}) == OK, "update");
        for (int n = 0; n < 4; n++) {
            expected[n] = i ? expected[n] : parameters[n].weight;
            check(!memcmp(expected[n], parameters[n].weight, sizes[n] * 4), "update on several threads");
            parameters[n].weight = NULL;
        }
        check(update(&(UpdateArgs){4, THREADS[i], 0.3f, 0.7f, parameters}) == OK, "update without weights");
    }
    free_buffers();
}

static void run_loss(int is_bf16, index_t rows, index_t units, index_t vocabulary_size, int full) {
    index_t columns = (vocabulary_size + 31) / 32 * 32, padded_units = (units + 31) / 32 * 32;
    LossArgs args = {is_bf16, rows, units, vocabulary_size, padded_units, columns, 1, 0.3f}, expected = args;
    args.hidden = numbers(is_bf16, rows * padded_units);
    args.weight = numbers(0, vocabulary_size * units);
    args.bias = numbers(0, vocabulary_size);
    args.targets = tokens(rows, vocabulary_size);
    args.packed = memory(columns * padded_units * (is_bf16 ? 2 : 4));
    for (int i = 0; i < 4; i++) {
        args.num_threads = THREADS[i], args.nats = buffer(rows * 4);
        if (full) {
            args.dhidden = calloc(rows * padded_units, 4), buffers[num_buffers++] = args.dhidden;
            args.dweight = buffer(vocabulary_size * units * 4), args.dbias = buffer(columns * 4);
            args.token_packed = memory(columns * padded_units * (is_bf16 ? 2 : 4));
        }
        check(linear_cross_entropy(&args) == OK, "linear_cross_entropy");
        expected = i ? expected : args;
        check(!memcmp(expected.nats, args.nats, rows * 4), "losses on several threads");
        if (!full) continue;
        check(!memcmp(expected.dhidden, args.dhidden, rows * padded_units * 4), "dhidden on several threads");
        check(!memcmp(expected.dweight, args.dweight, vocabulary_size * units * 4), "dweight on several threads");
        check(!memcmp(expected.dbias, args.dbias, columns * 4), "dbias on several threads");
    }
    CHECK_OUT_OF_MEMORY(linear_cross_entropy(&args))
    ((int64_t *)args.targets)[rows - 1] = -1;
    check(linear_cross_entropy(&args) == INVALID_TOKEN, "a target outside the vocabulary");
    free_buffers();
}

/* A weight (columns, inner), packed with the padding that the decoder reads. */
static void *packed(index_t columns, index_t inner, index_t depth) {
    index_t bytes = (columns + 31) / 32 * 32 * depth * 4;
    PackArgs args = {columns, inner, depth, 3, numbers(0, columns * inner), memset(buffer(bytes), 0, bytes)};
    check(pack(&args) == OK, "pack");
    return args.packed;
}

static void run_decoder(index_t cell, index_t num_layers, index_t lanes, index_t units, index_t embedding_size,
                        index_t vocabulary_size) {
    index_t length = 5, inputs = embedding_size, columns = (vocabulary_size + 31) / 32 * 32;
    DecoderLayer layers[3];
    DecoderState states[3], initial[3];
    for (index_t i = 0; i < num_layers; i++) {
        index_t H = units + i * 32, G = gates_of(cell) * H;
        layers[i] = (DecoderLayer){.units = H, .state_units = H - 5 * i};
        layers[i].table = inputs ? NULL : numbers(0, vocabulary_size * G);
        layers[i].input_weight = inputs ? packed(G, inputs, inputs) : NULL;
        layers[i].input_bias = inputs ? numbers(0, G) : NULL;
        layers[i].hidden_weight = packed(G, H - i, H);
        layers[i].hidden_bias = cell == GRU ? numbers(0, H) : NULL;
        initial[i].hidden = numbers(0, lanes * layers[i].state_units);
        initial[i].carry = cell == LSTM ? numbers(0, lanes * layers[i].state_units) : NULL;
        inputs = H;
    }
    DecoderArgs args = {cell, num_layers, lanes, length, embedding_size, vocabulary_size, columns, vocabulary_size - 1};
    args.layers = layers, args.states = states;
    args.embedding = embedding_size ? numbers(0, vocabulary_size * embedding_size) : NULL;
    args.weight = packed(vocabulary_size, inputs - 1, inputs);
    args.bias = numbers(0, columns);
    int64_t *expected_tokens = NULL;
    float *expected_logits = NULL, *expected_hidden = NULL;
    for (int n = 0; n < 4; n++) {
        for (index_t i = 0; i < num_layers; i++) {
            index_t bytes = lanes * layers[i].state_units * 4;
            states[i].hidden = copy(initial[i].hidden, bytes);
            states[i].carry = cell == LSTM ? copy(initial[i].carry, bytes) : NULL;
        }
        args.num_threads = THREADS[n], args.logits = buffer(lanes * columns * 4);
        args.tokens = tokens(length * lanes, vocabulary_size);
        check(decode(&args) == OK, "decode");
        for (index_t i = 0; i < length * lanes; i++)
            check(args.tokens[i] >= 0 && args.tokens[i] < vocabulary_size, "a generated token");
        if (!n) expected_tokens = args.tokens, expected_logits = args.logits, expected_hidden = states[0].hidden;
        check(!memcmp(expected_tokens, args.tokens, length * lanes * 8), "tokens of several threads");
        check(!memcmp(expected_logits, args.logits, lanes * columns * 4), "logits of several threads");
        check(!memcmp(expected_hidden, states[0].hidden, lanes * layers[0].state_units * 4),
              "states of several threads");
    }
    CHECK_OUT_OF_MEMORY(decode(&args))
    args.tokens[lanes - 1] = vocabulary_size;
    check(decode(&args) == INVALID_TOKEN, "a token outside the vocabulary");
    free_buffers();
}

static void run_dropout_keys(index_t lanes) {
    DropoutKeysArgs args = {0x7fffffffffffffff, 0x7fffffffffffffff, 123, 98, lanes, buffer(lanes * 4)};
    check(dropout_keys(&args) == OK, "dropout_keys");
    free_buffers();
}

static void run_dropout(int is_bf16, int is_locked, index_t steps, index_t lanes, index_t units) {
    index_t count = steps * lanes * units, bytes = count * (is_bf16 ? 2 : 4);
    DropoutArgs args = {is_bf16, steps, lanes, units, 1, is_locked, -10000, 0.7f};
    args.source = numbers(is_bf16, count);
    args.keys = numbers(0, lanes);
    void *expected = NULL;
    for (int i = 0; i < 4; i++) {
        args.num_threads = THREADS[i], args.out = buffer(bytes);
        check(dropout(&args) == OK, "dropout");
        expected = expected ? expected : args.out;
        check(!memcmp(expected, args.out, bytes), "dropout on several threads");
    }
    free_buffers();
}

static void run_kernels(int is_bf16) {
    for (index_t cell = RNN; cell <= LSTM; cell++)
        for (index_t steps = 1; steps <= 3; steps += 2)
            for (index_t lanes = 1; lanes < 140; lanes = lanes * 3 + 2) {
                run_rnn(cell, is_bf16, steps, lanes, 32, 5, 1);
                run_rnn(cell, is_bf16, steps, lanes, 75, 0, lanes % 2);
            }
    for (int transposed = 0; transposed < 2; transposed++)
        for (int out_is_bf16 = 0; out_is_bf16 <= is_bf16; out_is_bf16++) {
            run_linear(is_bf16, out_is_bf16, transposed, 1, 1, 32, 32, 0);
            run_linear(is_bf16, out_is_bf16, transposed, 1, 131, 160, 160, 7);
            run_linear(is_bf16, out_is_bf16, transposed, transposed ? 1 : 17, 64, 544, 32, 31);
            run_linear(is_bf16, out_is_bf16, transposed, 3, 9, 96, 96, 1);
        }
    for (int is_locked = 0; is_locked < 2; is_locked++) {
        run_dropout(is_bf16, is_locked, 1, 1, 1);
        run_dropout(is_bf16, is_locked, 3, 5, 129);
        run_dropout(is_bf16, is_locked, 1, 1, 70001);
    }
    run_weight_gradient(is_bf16, 1, 1, 32, 32, 32, 32, 32);
    run_weight_gradient(is_bf16, 3, 301, 96, 128, 64, 75, 61);
    run_weight_gradient(is_bf16, 1, 515, 160, 160, 32, 129, 1);
    run_segment_sum(is_bf16, 1, 32, 0, 0, 1);
    run_segment_sum(is_bf16, 77, 96, 64, 32, 9);
    run_segment_sum(is_bf16, 77, 96, 32, 32, 1);
    run_segment_sum(is_bf16, 77, 96, 0, 0, 2001);
    if (!is_bf16) run_segment_sum(0, 77, 75, 0, 0, 2001);
    for (index_t vocabulary_size = 1; vocabulary_size < 100; vocabulary_size = vocabulary_size * 3 + 1) {
        run_loss(is_bf16, 1, 32, vocabulary_size, 1);
        run_loss(is_bf16, 261, 96, vocabulary_size, vocabulary_size % 2); /* several blocks of rows */
        run_loss(is_bf16, 9, 75, vocabulary_size, 1);
        for (index_t cell = RNN; cell <= LSTM && !is_bf16; cell++) {
            run_decoder(cell, 1, 1, 32, 0, vocabulary_size);
            run_decoder(cell, 2, 67, 32, 0, vocabulary_size);
            run_decoder(cell, 3, 135, 32, 7, vocabulary_size);
        }
    }
}

/* --- collectives --- */

typedef struct {
    ShmGroup group;
    int item_size;
} member;

static void *run_member(void *argument) {
    member *self = argument;
    ShmGroup *group = &self->group;
    index_t workers = group->workers, limit = 3 * group->slot_bytes / self->item_size;
    char *data = malloc(limit * 8), *gathered[8];
    for (index_t rank = 0; rank < workers; rank++) gathered[rank] = malloc(limit);
    for (index_t number = 0, count = 1; number < 60; number++, count = (count * 5 + 3) % limit + 1) {
        for (index_t i = 0; i < count; i++) {
            double x = (double)(number + group->rank + i);
            if (self->item_size == 8)
                memcpy(data + i * 8, &x, 8);
            else
                memcpy(data + i * 4, &(float){(float)x}, 4);
        }
        check(!all_reduce(group, self->item_size, count, data), "all_reduce");
        for (index_t i = 0; i < count; i++) {
            double sum = (double)(workers * (number + i) + workers * (workers - 1) / 2), x;
            float y;
            memcpy(&x, data + i * self->item_size, self->item_size == 8 ? 8 : 4);
            memcpy(&y, data + i * self->item_size, 4);
            check((self->item_size == 8 ? x : y) == sum, "a sum");
        }
        memset(data, (int)(number + group->rank), count);
        check(!all_gather(group, count, data, (void *const *)gathered), "all_gather");
        for (index_t rank = 0; rank < workers; rank++)
            for (index_t i = 0; i < count; i++) check(gathered[rank][i] == (char)(number + rank), "gathered data");
    }
    for (index_t rank = 0; rank < workers; rank++) free(gathered[rank]);
    free(data);
    return NULL;
}

static void *run_timeout(void *argument) {
    member *self = argument;
    float data[3] = {0};
    check(all_reduce(&self->group, 4, 3, data) == 1, "a timeout");
    check(self->group.stalled_rank == 1, "the stalled rank");
    return NULL;
}

/* Of the members, which share memory of exactly the size that they need, `present` take part. */
static void run_group(void *(*work)(void *), index_t workers, index_t present, int item_size, index_t slot_bytes) {
    pthread_t threads[8];
    member members[8];
    index_t bytes = 64 + workers * 64 + (workers + 1) * slot_bytes;
    char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(memory, 0, bytes);
    for (index_t rank = 0; rank < present; rank++) {
        members[rank] = (member){{memory, rank, workers, slot_bytes, work == run_timeout ? 0.05 : 300}, item_size};
        check(!pthread_create(&threads[rank], NULL, work, &members[rank]), "pthread_create");
    }
    for (index_t rank = 0; rank < present; rank++) pthread_join(threads[rank], NULL);
    free(memory);
}

int main(void) {
    check(request_amx(), "request_amx");
    run_update();
    run_kernels(0);
    for (index_t lanes = 1; lanes < 20; lanes += 3) run_dropout_keys(lanes);
    if (supports_bf16()) run_kernels(1);
    check(struct_size("ShmGroup") == sizeof(ShmGroup) && struct_size("Other") == -1, "struct_size");
    for (index_t workers = 2; workers <= 5; workers++)
        for (int item_size = 4; item_size <= 8; item_size += 4) run_group(run_member, workers, workers, item_size, 192);
    run_group(run_timeout, 2, 1, 4, 64);
    printf("done, %s\n", supports_bf16() ? "with bf16" : "without bf16");
    return 0;
}
