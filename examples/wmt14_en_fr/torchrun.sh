#!/usr/bin/env bash
# 72 layers at the paper's batch on several machines. Start it on each of them, in a folder that all share:
#
#   NODES=2 NODE_RANK=0 MASTER=first-machine:29500 examples/wmt14_en_fr/torchrun.sh     # on the first
#   NODES=2 NODE_RANK=1 MASTER=first-machine:29500 examples/wmt14_en_fr/torchrun.sh     # on the second
#
# Every setting of train.sh can be given beside these. The batch of 1,280,000 tokens is kept on any number of GPUs.
set -euo pipefail
case ${1-} in -h | --help) exec "$(dirname "$0")/train.sh" --help ;; esac
: "${NODES:?how many machines}" "${NODE_RANK:?the number of this one, from 0}" "${MASTER:?host:port of the first}"
DEPTH=${DEPTH:-72} exec "$(dirname "$0")/train.sh" "$@"
