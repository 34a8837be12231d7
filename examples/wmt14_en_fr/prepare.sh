#!/usr/bin/env bash
. "$(dirname "$0")/../common/prepare.sh"

setting BPE 40000 "joint BPE merges" whole 1
TOKENIZE=(--normalize --dashes)
TOKENIZE_TEST=(--dashes --apostrophes)
VALID_EVERY=1333
CLEAN_BPE=(--max 250 --ratio 1.5)

file training-parallel-europarl-v7.tgz http://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz 657632379 \
    sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7
file training-parallel-commoncrawl.tgz http://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz 918311367 \
    sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5
file training-parallel-un.tgz http://www.statmt.org/wmt13/training-parallel-un.tgz 2365634246 \
    sha256:29141b5c1eba149a94f7a59d3b1a834b2e47fe0f8758d68dcd77a3d3f497ee47
file training-parallel-nc-v9.tgz http://www.statmt.org/wmt14/training-parallel-nc-v9.tgz 80418416 \
    sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485
file training-giga-fren.tar http://www.statmt.org/wmt10/training-giga-fren.tar 2595102720 \
    sha256:3ff8319f6919393520559bfbc7ad6a747ec81b3abc7be9993b338d4b017b4d9a
file test-full.tgz http://www.statmt.org/wmt14/test-full.tgz - md5:a8cd784e006feb32ac6f3d9ec7eb389a

prepare "WMT'14 English-French: 36 million sentences; test on newstest2014. Needs about 100 GB and a night." "$@"
