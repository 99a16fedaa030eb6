/* err.c - error sentences. */
#include "config/err.h"

#include <stdarg.h>
#include <stdio.h>

enum err err_set(char *msg, size_t msg_len, enum err code, const char *format, ...) {
    if (msg && msg_len) {
        va_list args;
        va_start(args, format);
        vsnprintf(msg, msg_len, format, args);
        va_end(args);
    }
    return code;
}

const char *err_name(enum err e) {
    switch (e) {
    case OK:
        return "OK";
    case ERR_ARG:
        return "ERR_ARG";
    case ERR_NOMEM:
        return "ERR_NOMEM";
    case ERR_FORMAT:
        return "ERR_FORMAT";
    case ERR_BUSY:
        return "ERR_BUSY";
    case ERR_NO_CUDA:
        return "ERR_NO_CUDA";
    case ERR_DEVICE:
        return "ERR_DEVICE";
    case ERR_IO:
        return "ERR_IO";
    }
    return "ERR_UNKNOWN";
}
