/* orders.h - a program's tests in both orders in which the emulator runs threads (tests/emu/emu.h).
 * Under AddressSanitizer, which makes them ten times slower, in the first alone: what is read and
 * written is the same in both. */
#ifndef URCHIN_TESTS_ORDERS_H
#define URCHIN_TESTS_ORDERS_H

#include "tests/emu/emu.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static uint64_t order_seed;

static inline int lock_step(void **state) {
    (void)state;
    emu_set_order(0, 0);
    return 0;
}

static inline int one_warp_at_a_time(void **state) {
    (void)state;
    emu_set_order(2, order_seed);
    return 0;
}

/* at_end: after each, or NULL.  Returns how many failed. */
static inline int run_in_both_orders(const struct CMUnitTest *tests, size_t n, uint64_t seed,
                                     CMFixtureFunction at_end) {
    order_seed = seed;
    int failed = _cmocka_run_group_tests("lock-step", tests, n, lock_step, at_end);
#if !defined(__SANITIZE_ADDRESS__)
    failed += _cmocka_run_group_tests("one warp at a time", tests, n, one_warp_at_a_time, at_end);
#endif
    return failed;
}

#endif
