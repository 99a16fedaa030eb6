/* sha256.h - SHA-256 (FIPS 180-4), for the digests of base models.
 * With the CPU's SHA instructions 98 MB take about 0.05 s, without them about 0.3 s: a start needs
 * no remembered verdicts. */
#ifndef URCHIN_MODEL_SHA256_H
#define URCHIN_MODEL_SHA256_H

#include <stddef.h>

enum { SHA256_HEX = 65 }; /* 64 lower-case digits and NUL */

void sha256_hex(const void *bytes, size_t len, char out[SHA256_HEX]);

/* The same without the CPU's SHA instructions (tests compare the two). */
void sha256_hex_portable(const void *bytes, size_t len, char out[SHA256_HEX]);

#endif
