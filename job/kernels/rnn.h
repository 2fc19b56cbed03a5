/* A recurrent layer's forward pass with a weight that is packed already. */

#ifndef RNN_H
#define RNN_H

#include "api.h"

typedef struct {
    const RnnArgs *args;
    const uint32_t *packed; /* the weight, by pack_columns for forward and by pack_rows for backward */
} rnn_task;

void rnn_forward_lanes(const void *task, index_t first, index_t count);

#endif
