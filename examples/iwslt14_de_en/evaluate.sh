#!/usr/bin/env bash
. "$(dirname "$0")/../common/evaluate.sh"
search 5 1
evaluate "IWSLT'14 German-English: BLEU and chrF on the five test sets together, lower-cased." --lowercase -- "$@"
