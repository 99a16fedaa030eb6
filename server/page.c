/* page.c - page.html as it lies in the source folder, inside the program (built from the repository
 * root). */
#include "server/page.h"

__asm__(".section .rodata\n"
        ".global page_html, page_html_end\n"
        "page_html:\n"
        ".incbin \"server/page.html\"\n"
        "page_html_end:\n"
        ".byte 0\n"
        ".previous\n");
