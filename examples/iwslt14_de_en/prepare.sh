#!/usr/bin/env bash
. "$(dirname "$0")/../common/prepare.sh"

setting BPE 10000 "joint BPE merges" whole 1
TOKENIZE=(--lowercase)
TOKENIZE_TEST=(--lowercase --apostrophes)
CLEAN_TOKENS=(--max 175 --ratio 1.5)
VALID_EVERY=23

file de-en.tgz http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz 19982877

prepare "IWSLT'14 German-English: 160,000 sentences of TED talks, lower-cased; test on dev2010, dev2012, tst2010 to 2012." "$@"
