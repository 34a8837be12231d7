#!/usr/bin/env bash
. "$(dirname "$0")/../common/evaluate.sh"
search 5 0.8
evaluate "WMT'14 English-French: BLEU and chrF on newstest2014." -- "$@"
