/* amx_trap.h - runs a program's AMX instructions on an x86-64 CPU without AMX: each of them is an
 * illegal instruction there, and the handler of that signal does in C what it says, with
 * amx_model.h.  So the very object code that is shipped is tested: what the compiler made of the
 * order of stores, tile instructions and loads, of addresses and of tile numbers.
 *
 * Include with AMX_MODEL defined. */
#ifndef URCHIN_TESTS_AMX_TRAP_H
#define URCHIN_TESTS_AMX_TRAP_H

#include "compute/amx.h"
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

static struct sigaction amx_trap_before;

static inline uint64_t amx_trap_register(const ucontext_t *context, int number) {
    static const int at[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[at[number]];
}

/* Does the instruction at ip and returns its length, or 0 where it is none of ours.  All are
 *   C4  R X B 00010 (inverted; map 0F 38)  0 vvvv (inverted) 0 pp  opcode  ModRM [SIB]
 * [displacement] */
static int amx_trap_do(const ucontext_t *context, const uint8_t *ip) {
    if (ip[0] != 0xc4 || (ip[1] & 0x1f) != 2 || ip[2] & 0x84) return 0;
    const int prefix = ip[2] & 3, third = ~ip[2] >> 3 & 15, opcode = ip[3]; /* pp: -, 66, F3, F2 */
    const int mod = ip[4] >> 6, reg = ip[4] >> 3 & 7, rm = ip[4] & 7;
    int length = 5;
    uint64_t address = 0, stride = 0;
    if (mod != 3) {
        const uint64_t x = ip[1] & 0x40 ? 0 : 8, b = ip[1] & 0x20 ? 0 : 8;
        const bool has_sib = rm == 4;
        const uint8_t sib = has_sib ? ip[length++] : 0;
        const int base = has_sib ? sib & 7 : rm, index = (int)((sib >> 3 & 7) + x);
        const bool no_base = base == 5 && mod == 0; /* or, without SIB, the next instruction */
        if (has_sib && index != 4) stride = amx_trap_register(context, index) << (sib >> 6);
        if (!no_base) address = amx_trap_register(context, (int)((uint64_t)base + b));
        if (mod == 1) {
            address += (uint64_t)(int8_t)ip[length];
            length += 1;
        } else if (mod == 2 || no_base) {
            int32_t displacement;
            memcpy(&displacement, ip + length, 4);
            address += (uint64_t)displacement;
            length += 4;
        }
        if (no_base && !has_sib) address += (uint64_t)ip + (uint64_t)length;
    }
    void *memory = (void *)address;
    if (opcode == 0x49 && prefix == 0 && mod != 3 && reg == 0)
        tiles_configure(memory);
    else if (opcode == 0x49 && prefix == 0 && ip[4] == 0xc0)
        tiles_release();
    else if (opcode == 0x49 && prefix == 3 && mod == 3 && rm == 0)
        tile_zero(reg);
    else if (opcode == 0x4b && prefix == 3 && mod != 3 && rm == 4)
        tile_load(reg, memory, stride);
    else if (opcode == 0x4b && prefix == 2 && mod != 3 && rm == 4)
        tile_store(reg, memory, stride);
    else if (opcode == 0x5e && prefix == 3 && mod == 3)
        tile_dot(reg, rm, third);
    else if (opcode == 0x5c && prefix == 2 && mod == 3)
        tile_dot_bf16(reg, rm, third);
    else
        return 0;
    return length;
}

static void amx_trap_handle(int signal, siginfo_t *info, void *context) {
    ucontext_t *c = context;
    (void)info;
    int length = amx_trap_do(c, (const uint8_t *)c->uc_mcontext.gregs[REG_RIP]);
    if (length == 0) { /* it happens again, for whom it concerns */
        sigaction(signal, &amx_trap_before, NULL);
        return;
    }
    c->uc_mcontext.gregs[REG_RIP] += length;
}

static void amx_trap_begin(void) {
    struct sigaction action = {.sa_sigaction = amx_trap_handle, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, &amx_trap_before);
}
/* Also in a thread that blocks signals, as those of a team do. */
static void amx_trap_unblock(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGILL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}
static void amx_trap_end(void) {
    sigaction(SIGILL, &amx_trap_before, NULL);
}

#endif
