/* Permission to use tiles, and the sizes of each thread's tiles. To set these takes as long as some ten products of tiles,
   so they are kept until they change. */

#include "tiles.h"

int uses_amx(void) { return USES_TILES; }

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

int request_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 }; /* Linux: Documentation/arch/x86/xstate.rst */
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static _Thread_local index_t configured_rows; /* 0: the tiles are released */

void configure_tiles(index_t rows) {
    if (rows == configured_rows) return;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1};
    index_t second = rows > TILE ? rows - TILE : 0, first = rows - second;
    const index_t ROWS[8] = {first, first, second, second, first, second, TILE, TILE};
    for (int i = 0; i < 8; i++) sizes.rows[i] = (uint8_t)ROWS[i], sizes.row_bytes[i] = ROWS[i] ? TILE * 4 : 0;
    __asm__ volatile("" ::"m"(sizes)); /* gcc's intrinsic declares that it reads eight bytes */
    _tile_loadconfig(&sizes);
    configured_rows = rows;
}

void release_tiles(void) {
    if (configured_rows) _tile_release();
    configured_rows = 0;
}
#else
int request_amx(void) { return 1; }
#endif
