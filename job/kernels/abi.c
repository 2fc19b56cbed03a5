/* What Python queries when it has loaded the library. */

#include <stddef.h>
#include <string.h>

#include "api.h"

#define SIZE(type) {#type, sizeof(type)}

int struct_size(const char *name) {
    static const struct {
        const char *name;
        int size;
    } SIZES[] = {
        SIZE(RnnArgs),      SIZE(LinearArgs),   SIZE(LossArgs),    SIZE(WeightGradientArgs), SIZE(PackArgs),
        SIZE(DecoderLayer), SIZE(DecoderState), SIZE(DecoderArgs), SIZE(SegmentSumArgs),     SIZE(DropoutKeysArgs),
        SIZE(DropoutArgs),  SIZE(ShmGroup),     SIZE(Parameter),   SIZE(UpdateArgs),         SIZE(SquaresArgs),
    };
    for (size_t i = 0; i < sizeof SIZES / sizeof *SIZES; i++)
        if (!strcmp(name, SIZES[i].name)) return SIZES[i].size;
    return -1;
}

int supports_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
