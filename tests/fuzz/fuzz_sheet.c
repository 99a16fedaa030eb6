/* fuzz_sheet.c - any JSON as the document of a report: it makes a page, into which strings bring no
 * markup. */
#include "convert/sheet.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    cJSON *json = cJSON_ParseWithLength((const char *)data, size);
    char *page = json ? sheet_html(json) : NULL;
    if (json && !page) abort();
    if (page && (strstr(page, "<script") || strstr(page, "<img") || strstr(page, "<a "))) abort();
    free(page);
    cJSON_Delete(json);
    return 0;
}
