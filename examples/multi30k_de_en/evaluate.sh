#!/usr/bin/env bash
. "$(dirname "$0")/../common/evaluate.sh"
search 5 1
evaluate "Multi30k German-English: BLEU and chrF on test_2016_flickr, lower-cased." --lowercase -- "$@"
