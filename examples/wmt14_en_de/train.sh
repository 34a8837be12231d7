#!/usr/bin/env bash
. "$(dirname "$0")/../common/train.sh"

hyper_parameters 1e-3 8000 0.1 0 32768 8192 100 authors 1

train "WMT'14 English-German, base width." wmt_en_de -- "$@"
