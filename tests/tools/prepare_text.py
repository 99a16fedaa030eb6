#!/usr/bin/env python3
"""Makes evaluation texts out of public data sets.

    prepare_text.py wikitext  wiki.valid.tokens    [BYTES] > text
    prepare_text.py novel     Doyle_Lost_1912.txt  [BYTES] > text
    prepare_text.py stories   tinystories_valid.txt [BYTES] > text

wikitext: WikiText's word-level form is joined again (" @-@ ", spaces before punctuation, inside
brackets and quotes); <unk> stays.  novel: the byte-order mark and carriage returns go.  BYTES cuts
after the last line end before so many bytes.
"""

import re
import sys


def join_words(text):
    for sign in "-,.":
        text = text.replace(f" @{sign}@ ", sign)
    text = re.sub(r" ([.,;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = text.replace(" 's", "'s")
    return re.sub(r'" ([^"]*?) "', r'"\1"', text)


def main(kind, path, limit=None):
    with open(path, "rb") as f:
        text = f.read().decode("utf-8-sig")
    if kind == "wikitext":
        text = join_words(text)
    elif kind == "novel":
        text = text.replace("\r\n", "\n")
    elif kind != "stories":
        sys.exit(__doc__)
    data = text.encode()
    if limit:
        data = data[: data.rfind(b"\n", 0, int(limit)) + 1]
    sys.stdout.buffer.write(data)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
