#!/usr/bin/env bash
. "$(dirname "$0")/../common/train.sh"

if [ "$DEPTH" = 72 ]; then
    hyper_parameters 1e-3 8000 0.2 0 1280000 5000 50 authors 1
else
    hyper_parameters 7e-4 8000 0.1 0 640000 8000 50 authors 1
fi

train "WMT'14 English-French, base width; DEPTH=72 is the 60-12 model of 43.80 BLEU." wmt_en_de -- "$@"
