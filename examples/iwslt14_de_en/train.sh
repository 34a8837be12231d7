#!/usr/bin/env bash
. "$(dirname "$0")/../common/train.sh"

hyper_parameters 7e-4 6000 0.3 1e-4 4096 4096 90 authors 1
setting RDROP 0 "R-Drop's alpha, 5 in its paper; 0 trains without" decimal

options=()
if [ "$RDROP" != 0 ]; then
    options=(--criterion label_smoothed_cross_entropy_with_rdrop --rdrop-alpha "$RDROP")
fi
train "IWSLT'14 German-English, 512 wide, feed-forward 1024." iwslt_de_en "${options[@]}" -- "$@"
