/* Decoding: steps of a complete model in one call, in float32. Each thread takes some lanes. */

#include <stdatomic.h>

#include "cells.h"
#include "linear.h"
#include "rnn.h"
#include "threads.h"

typedef struct {
    RnnArgs rnn;          /* of one step of some lanes */
    packed_product input; /* its left factor: features of the tokens, or hidden states of the layer below */
} layer_step;

typedef struct {
    const DecoderArgs *args;
    atomic_int *failed; /* set if a thread has no memory */
} decoder_task;

static index_t lane_floats(const DecoderArgs *args) {
    index_t total = args->embedding_size;
    for (index_t i = 0; i < args->num_layers; i++) total += (4 + num_gates(args->cell)) * args->layers[i].units;
    return total;
}

/* Divides the memory of `lanes` lanes among the layers, after the features of their tokens. */
static void place_layers(const DecoderArgs *args, layer_step *steps, float *memory, index_t lanes) {
    const float *below = memory;
    index_t below_units = args->embedding_size;
    memory += lanes * args->embedding_size;
    for (index_t i = 0; i < args->num_layers; i++) {
        const DecoderLayer *layer = &args->layers[i];
        index_t size = lanes * layer->units, G = num_gates(args->cell) * layer->units;
        RnnArgs rnn = {
            .cell = args->cell, .steps = 1, .lanes = lanes, .units = layer->units, .bias = layer->hidden_bias};
        rnn.hidden = memory;
        rnn.carry = args->cell == LSTM ? memory + 2 * size : memory;
        rnn.inputs = layer->table ? layer->table : memory + 4 * size;
        steps[i] = (layer_step){rnn, {below, layer->input_weight, layer->input_bias, below_units, below_units, G}};
        below = memory + size;
        below_units = layer->units;
        memory += 4 * size + lanes * G;
    }
}

/* Copies the state of the lanes from `first` on to or from the caller's, which has no padding. */
static void copy_states(const DecoderArgs *args, const layer_step *steps, index_t first, int is_after) {
    for (index_t i = 0; i < args->num_layers; i++) {
        const RnnArgs *rnn = &steps[i].rnn;
        index_t H = args->layers[i].state_units;
        for (index_t part = 0; part < (args->cell == LSTM ? 2 : 1); part++)
            for (index_t lane = 0; lane < rnn->lanes; lane++) {
                float *own = (part ? rnn->carry : (float *)rnn->hidden) + lane * rnn->units;
                float *callers = (part ? args->states[i].carry : args->states[i].hidden) + (first + lane) * H;
                if (!is_after) memset(own, 0, rnn->units * sizeof *own);
                memcpy(is_after ? callers : own, is_after ? own : callers, H * sizeof *own);
            }
    }
}

static void step_layer(const layer_step *step, const DecoderLayer *layer) {
    const RnnArgs *rnn = &step->rnn;
    index_t size = rnn->lanes * rnn->units;
    if (!layer->table) product_rows(0, 0, &step->input, 0, rnn->lanes, (float *)rnn->inputs);
    rnn_task task = {rnn, layer->hidden_weight};
    rnn_forward_lanes(&task, 0, rnn->lanes);
    memcpy(rnn->hidden, (float *)rnn->hidden + size, size * sizeof(float));
    if (rnn->cell == LSTM) memcpy(rnn->carry, rnn->carry + size, size * sizeof(float));
}

static index_t argmax(const float *x, index_t count) {
    index_t best = 0;
    for (index_t j = 1; j < count; j++)
        if (x[j] > x[best]) best = j;
    return best;
}

/* Decodes the lanes from `first` on for which the layers have been placed, at most BLOCK_ROWS. */
static void decode_block(const DecoderArgs *args, layer_step *steps, float *features, index_t first) {
    index_t lanes = steps[0].rnn.lanes, E = args->embedding_size, columns = args->columns;
    const RnnArgs *last = &steps[args->num_layers - 1].rnn;
    packed_product output = {(float *)last->hidden, args->weight, args->bias, last->units, last->units, columns};
    float *logits = args->logits + first * columns;
    uint8_t starts[BLOCK_ROWS];
    copy_states(args, steps, first, 0);
    for (index_t t = 0; t < args->length; t++) {
        int64_t *tokens = args->tokens + t * args->lanes + first;
        for (index_t lane = 0; lane < lanes; lane++) {
            starts[lane] = tokens[lane] == args->reset_token;
            if (E) memcpy(features + lane * E, args->embedding + tokens[lane] * E, E * sizeof *features);
        }
        for (index_t i = 0; i < args->num_layers; i++) {
            steps[i].rnn.starts = starts;
            steps[i].rnn.tokens = args->layers[i].table ? tokens : NULL;
            step_layer(&steps[i], &args->layers[i]);
        }
        product_rows(0, 0, &output, 0, lanes, logits);
        for (index_t lane = 0; t + 1 < args->length && lane < lanes; lane++)
            tokens[args->lanes + lane] = argmax(logits + lane * columns, args->vocabulary_size);
    }
    copy_states(args, steps, first, 1);
}

static void decode_lanes(const void *argument, index_t first, index_t count) {
    const decoder_task *task = argument;
    const DecoderArgs *args = task->args;
    float *memory = alloc_floats((count < BLOCK_ROWS ? count : BLOCK_ROWS) * lane_floats(args));
    layer_step *steps = calloc(args->num_layers, sizeof *steps);
    if (!memory || !steps) *task->failed = 1;
    for (; memory && steps && count > 0; first += BLOCK_ROWS, count -= BLOCK_ROWS) {
        place_layers(args, steps, memory, count < BLOCK_ROWS ? count : BLOCK_ROWS);
        decode_block(args, steps, memory, first);
    }
    free(steps);
    free(memory);
}

int decode(const DecoderArgs *args) {
    for (index_t lane = 0; lane < args->lanes; lane++)
        if (args->tokens[lane] < 0 || args->tokens[lane] >= args->vocabulary_size) return INVALID_TOKEN;
    atomic_int failed = 0;
    decoder_task task = {args, &failed};
    parallel_for(decode_lanes, &task, args->lanes, TILE_ROWS, args->num_threads);
    return failed ? OUT_OF_MEMORY : OK;
}

int pack(const PackArgs *args) {
    packing packing = {0, 1, 1, args->weight, args->columns, args->inner, args->depth, args->columns, args->packed};
    pack_weight(&packing, args->num_threads);
    return OK;
}
