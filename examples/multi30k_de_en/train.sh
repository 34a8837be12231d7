#!/usr/bin/env bash
. "$(dirname "$0")/../common/train.sh"

hyper_parameters 2e-3 1000 0.3 1e-4 4096 4096 40 authors 16

train "Multi30k German-English: 128 wide, minutes on one GPU." "" \
    --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4 --decoder-attention-heads 4 -- "$@"
