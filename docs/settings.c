/* settings.c - prints docs/settings.md from the table of settings; `make docs`. */
#include "config/settings.h"

int main(void) {
    settings_markdown(stdout);
    return fflush(stdout) || ferror(stdout);
}
