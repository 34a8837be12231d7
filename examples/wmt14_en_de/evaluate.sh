#!/usr/bin/env bash
. "$(dirname "$0")/../common/evaluate.sh"
search 4 0.6
evaluate "WMT'14 English-German: BLEU and chrF on newstest2014." --compounds -- "$@"
