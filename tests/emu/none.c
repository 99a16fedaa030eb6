/* none.c - in place of the emulator, for tests of kernels on a real device: it orders threads by itself. */
#include "tests/emu/emu.h"

void emu_set_order(int mode, uint64_t seed) {
    (void)mode;
    (void)seed;
}
