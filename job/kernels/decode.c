/* Greedy decoding: many small steps in one call, in float32 and on one thread. */

#include "cells.h"
#include "linear.h"
#include "rnn.h"
#include "threads.h"

typedef struct {
    RnnArgs rnn;
    uint32_t *packed_recurrent;
    packed_product input; /* of an upper layer; its left factor is the layer below */
} layer_state;

static uint32_t *packed_weight(const float *weight, index_t columns, index_t inner) {
    uint32_t *packed = alloc_floats((columns + PANEL - 1) / PANEL * PANEL * inner);
    if (packed) pack_columns(0, packed, weight, columns, inner, inner);
    return packed;
}

static void project(const packed_product *product, index_t rows, float *out) {
    for (index_t first = 0; first < rows; first += BLOCK_ROWS)
        product_rows(0, 0, product, first, rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS,
                     out + first * product->columns);
}

static void step_layer(const layer_state *layer) {
    const RnnArgs *rnn = &layer->rnn;
    float *hidden = rnn->hidden, *carry = rnn->carry;
    index_t size = rnn->lanes * rnn->units;
    if (layer->input.packed) project(&layer->input, rnn->lanes, (float *)rnn->inputs);
    rnn_task task = {rnn, layer->packed_recurrent};
    rnn_forward_lanes(&task, 0, rnn->lanes);
    memcpy(hidden, hidden + size, size * sizeof *hidden);
    if (carry && carry != hidden) memcpy(carry, carry + size, size * sizeof *carry);
}

/* Sets the state of the lanes that read this token to zero. */
static void reset_lanes(const RnnArgs *rnn, const int64_t *tokens, index_t token) {
    float *hidden = rnn->hidden, *carry = rnn->carry;
    index_t H = rnn->units;
    for (index_t lane = 0; lane < rnn->lanes; lane++)
        if (tokens[lane] == token) {
            memset(hidden + lane * H, 0, H * sizeof *hidden);
            if (carry) memset(carry + lane * H, 0, H * sizeof *carry);
        }
}

static index_t argmax(const float *x, index_t count) {
    index_t best = 0;
    for (index_t j = 1; j < count; j++)
        if (x[j] > x[best]) best = j;
    return best;
}

int generate_greedy(const DecoderArgs *args) {
    const RnnArgs *last = &args->layers[args->num_layers - 1].rnn;
    index_t H = last->units, B = last->lanes, G = num_gates(last->cell) * H, V = args->vocabulary_size;
    index_t columns = (V + PANEL - 1) / PANEL * PANEL;
    packed_product output = {
        (float *)last->hidden + B * H, packed_weight(args->weight, V, H), args->bias, H, H, columns, 1};
    float *logits = alloc_floats(B * columns);
    layer_state *layers = calloc(args->num_layers, sizeof *layers);
    int failed = !output.packed || !logits || !layers;
    for (index_t i = 0; i < args->num_layers && !failed; i++) {
        const DecoderLayer *layer = &args->layers[i];
        layers[i].rnn = layer->rnn;
        failed |= !(layers[i].packed_recurrent = packed_weight(layer->rnn.weight, G, H));
        if (i) {
            const float *below = (const float *)layers[i - 1].rnn.hidden + B * H;
            layers[i].input = (packed_product){below, packed_weight(layer->weight, G, H), layer->bias, H, H, G, 1};
            failed |= !layers[i].input.packed;
        }
    }
    for (index_t t = 0; t < args->length && !failed; t++) {
        layers[0].rnn.tokens = args->tokens + t * B;
        for (index_t i = 0; i < args->num_layers; i++) {
            reset_lanes(&layers[i].rnn, layers[0].rnn.tokens, args->reset_token);
            step_layer(&layers[i]);
        }
        project(&output, B, logits);
        for (index_t lane = 0; lane < B; lane++) args->tokens[(t + 1) * B + lane] = argmax(logits + lane * columns, V);
    }
    for (index_t i = 0; layers && i < args->num_layers; i++) {
        free(layers[i].packed_recurrent);
        free((void *)layers[i].input.packed);
    }
    free(layers);
    free(logits);
    free((void *)output.packed);
    return failed ? OUT_OF_MEMORY : OK;
}
