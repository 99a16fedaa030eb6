/* files.h - what a conversion leaves on disk, each file whole or not at all. */
#ifndef URCHIN_CONVERT_FILES_H
#define URCHIN_CONVERT_FILES_H

#include "config/err.h"
#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>

struct part { /* bytes of a file, one after the other */
    const void *bytes;
    size_t len;
};

/* folder/name holds the n parts, or what it held before: they are written to folder/name.new,
 * synced, and renamed.  ERR_IO with a sentence (a full disk); then folder/name.new is gone. */
enum err file_replace(const char *folder, const char *name, const struct part *parts, int n,
                      char *msg, size_t msg_len);

/* The same of a JSON document, indented and with a line end; json may be NULL (out of memory). */
enum err file_replace_json(const char *folder, const char *name, const cJSON *json, char *msg,
                           size_t msg_len);

/* A safetensors file of F32 tensors. */
struct tensor_out {
    char name[64];
    int n_dims;
    int dims[3];
    const float *values; /* borrowed */
};
enum err file_replace_tensors(const char *folder, const char *name,
                              const struct tensor_out *tensors, int n, char *msg, size_t msg_len);

bool folder_is(const char *path); /* is there a folder of that name? */

/* How much it holds, hidden things too; -1: it cannot be read, or is no folder. */
int folder_count(const char *path);

/* The folder itself, made where there is none (its parent must be there). */
enum err folder_make(const char *folder, char *msg, size_t msg_len);

/* folder/name is a link to target (made absolute); a link that is there is replaced. */
enum err file_link(const char *folder, const char *name, const char *target, char *msg,
                   size_t msg_len);

#endif
