#!/usr/bin/env python3
"""Writes tests/data/tokenizers/small.json: small tokenizer.json files, one per part of the format, with
the ids that Hugging Face's tokenizers package gives.  Needs `pip install tokenizers` (made with 0.23.3).

    python3 tests/tools/tokenizer_cases.py > tests/data/tokenizers/small.json
"""
import json

from tokenizers import Tokenizer


def vocab(base, more):
    return {t: i for i, t in enumerate(dict.fromkeys(base + more))}


def added(v, *tokens):
    out, n = [], len(v)
    for content, special, normalized, lstrip, rstrip in tokens:
        i = v.get(content)
        if i is None:
            i, n = n, n + 1
        out.append(dict(id=i, content=content, single_word=False, lstrip=lstrip, rstrip=rstrip,
                        normalized=normalized, special=special))
    return out


def tokenizer(model, pre=None, normalizer=None, tokens=()):
    return dict(version='1.0', truncation=None, padding=None, added_tokens=list(tokens), normalizer=normalizer,
                pre_tokenizer=pre, post_processor=None, decoder=None, model=dict(type='BPE', **model))


def cases():
    fallback = ['<0x%02X>' % i for i in (0xC3, 0xA9, 0x0A, 0x21, 0xCC, 0x81)]
    v = vocab(['<unk>', '<s>', '</s>'] + fallback + list('▁helowrd'), ['▁h', 'ello', '▁hello', 'lo', 'el', 'll', 'he', 'ello▁'])
    merges = [['h', 'e'], ['l', 'l'], ['l', 'o'], ['▁', 'h'], ['e', 'l'], ['el', 'lo'], ['▁h', 'ello'], ['ello', '▁']]
    for scheme in ('first', 'always', 'never'):
        for split in (True, False):
            yield (f'Metaspace {scheme}{"" if split else " whole"}, byte fallback, NFC, added tokens', tokenizer(
                dict(unk_token='<unk>', fuse_unk=True, byte_fallback=True, vocab=v, merges=merges),
                {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': split}, {'type': 'NFC'},
                added(v, ('<unk>', True, False, False, False), ('<s>', True, False, False, True),
                      ('<x>', False, False, True, False), ('yes', False, True, False, False))),
                ['hello hello', '  hello', 'hello <x> hello<x>', '<s>  hello', 'e\u0301!\n', 'yesqhello zz', 'hello▁hello', ''])

    v = vocab(['<|e|>'] + list('abcdelo.ĠĊÃ©'), ['ab', 'Ġa', 'Ġab', 'Ġa.', 'bc', 'abc', '..'])
    for ignore in (True, False):
        for prefix in (True, False):
            yield (f'ByteLevel{" prefix" if prefix else ""}{" ignore_merges" if ignore else ""}', tokenizer(
                dict(ignore_merges=ignore, vocab=v, merges=['a b', 'Ġ a', '. .', 'Ġa b']),
                {'type': 'Sequence', 'pretokenizers': [{'type': 'ByteLevel', 'add_prefix_space': prefix, 'trim_offsets': True, 'use_regex': False}]},
                None, added(v, ('<|e|>', True, False, False, False))),
                ['ab', 'ab ab', ' ab', 'a.', 'é\n', '<|e|>ab', 'ab..', 'abc'])

    v = vocab(['<u>'] + list('ab-'), ['ab', 'bb', 'aa', 'ba', 'abb', 'aab', '-a', 'a-', '--', '-b', 'b-', 'aba'])
    merges = ['a a', '- -', 'b b', 'a -', '- a', '- b', 'b -', 'a b', 'b a']
    for pattern in ({'Regex': '-'}, {'String': '-'}, {'Regex': 'a?'}):
        for behavior in ('Isolated', 'Removed', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'):
            for invert in (False, True):
                yield (f'Split {pattern} {behavior}{" inverted" if invert else ""}', tokenizer(
                    dict(unk_token='<u>', vocab=v, merges=merges),
                    {'type': 'Split', 'pattern': pattern, 'behavior': behavior, 'invert': invert}),
                    ['aa--bb-a', '-ab-', '--', 'ab', 'bba'])

    v = vocab(['<unk>', '▁', 'a', 'b'], ['▁a', '▁ab', 'ab', 'b▁'])
    for fuse in (True, False):
        yield (f'Prepend and Replace{", fused unknowns" if fuse else ""}', tokenizer(
            dict(unk_token='<unk>', fuse_unk=fuse, byte_fallback=False, vocab=v, merges=['▁ a', 'a b', '▁a b', 'b ▁']), None,
            {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
                                                 {'type': 'Replace', 'pattern': {'Regex': 'x+'}, 'content': 'b'}]},
            added(v, ('<unk>', True, False, False, False), ('bab', False, True, False, False), ('[k]', False, False, True, True))),
            ['ab', 'a b', '', 'axxx', 'qqa', 'bab abab', 'a [k] a', '[k]', 'ab ab'])

    v = vocab(['<u>'] + list('123a½'), ['12', '23', '1a'])
    for single in (False, True):
        yield (f'Digits{" one by one" if single else ""}', tokenizer(
            dict(unk_token='<u>', vocab=v, merges=['1 2', '1 a', '2 3']), {'type': 'Digits', 'individual_digits': single}),
            ['1a23½', '123', 'a12½3'])

    v = vocab(['<u>'] + list('eéfiﬁ') + ['\u0301', '\u0316', 'Å', '가', 'ᄀ', 'ᅡ'], [])
    for form in ('NFC', 'NFD', 'NFKC', 'NFKD'):
        yield (form, tokenizer(dict(unk_token='<u>', vocab=v, merges=[]), None, {'type': form}),
               ['é', 'e\u0301', 'ﬁ', 'e\u0301\u0316', 'e\u0316\u0301', '\u212B', '가', '\u1100\u1161'])


def main():
    out = []
    for name, json_value, texts in cases():
        text = json.dumps(json_value, ensure_ascii=False, separators=(',', ':'))
        hf = Tokenizer.from_str(text)
        out.append(dict(name=name, tokenizer=text,
                        texts=[dict(text=t, ids=hf.encode(t, add_special_tokens=False).ids) for t in texts]))
    print('[\n' + ',\n'.join(json.dumps(c, ensure_ascii=False) for c in out) + '\n]')


main()
