#!/usr/bin/env bash
. "$(dirname "$0")/../common/prepare.sh"

setting BPE 32764 "joint BPE merges" whole 1
TOKENIZE=(--normalize --dashes)
TOKENIZE_TEST=(--dashes --apostrophes)
CLEAN_TOKENS=(--max 80)

file training-parallel-europarl-v7.tgz http://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz 657632379 \
    sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7
file training-parallel-commoncrawl.tgz http://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz 918311367 \
    sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5
file training-parallel-nc-v12.tgz http://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz 168591139 \
    sha256:2b45f30ef1d550d302fd17dd3a5cbe19134ccc4c2cf50c2dae534aee600101a2
file dev.tgz http://data.statmt.org/wmt17/translation-task/dev.tgz
file test-full.tgz http://www.statmt.org/wmt14/test-full.tgz - md5:a8cd784e006feb32ac6f3d9ec7eb389a

prepare "WMT'14 English-German: 4.5 million sentences; validation on newstest2013, test on newstest2014." "$@"
