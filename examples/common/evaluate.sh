# From checkpoints to scores. A recipe's evaluate.sh sources this, sets its search and calls evaluate.
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

setting METHOD admin "names the default RUN, as in train.sh"
setting DEPTH 6 "the same"
setting SEED 1111 "the same"
setting DATA "data/$RECIPE" "the data-bin that prepare.sh made"
setting RUN "runs/$RECIPE/$METHOD-$DEPTH-$SEED" "the training's folder; results go to RUN/test"
setting LAST 10 "average the newest so many epochs' checkpoints, or as many as there are"
setting MAX_TOKENS 8000 "source tokens a batch"

# search BEAM LENPEN: the recipe's defaults
search() {
    setting BEAM "$1" "beam size"
    setting LENPEN "$2" "exponent of the length in the hypotheses' scores"
}

average() {
    local found
    found=$(find "$RUN" -maxdepth 1 -regex '.*/checkpoint[0-9]+\.pt' | wc -l)
    [ "$found" -gt 0 ] || { echo "$RUN holds no epoch's checkpoint; run train.sh first" >&2; return 1; }
    if [ "$found" -lt "$LAST" ]; then say "note: only $found of $LAST checkpoints are there to average"; fi
    python -m admin_fairseq average --inputs "$RUN" --num-epoch-checkpoints $((found < LAST ? found : LAST)) \
        --output "$OUT/average.pt"
}

generate() {
    local device=()
    python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || device=(--cpu)
    # fairseq drops the last batch unless its size is a multiple of --required-batch-size-multiple
    fairseq-generate "$DATA" --user-dir "$REPOSITORY/admin_fairseq" --path "$OUT/average.pt" --gen-subset test \
        --beam "$BEAM" --lenpen "$LENPEN" --post-process subword_nmt --max-tokens "$MAX_TOKENS" \
        --required-batch-size-multiple 1 "${device[@]}" >"$OUT/generate.log" 2>&1 ||
        { tail -n 5 "$OUT/generate.log" >&2; return 1; }
}

# evaluate TEXT OPTIONS... -- "$@": OPTIONS are the recipe's own for score.py
evaluate() {
    local text=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    begin "$text" "$@"
    [ -d "$RUN" ] || die "RUN=$RUN is not there; run $(dirname "$0")/train.sh first"
    OUT=$RUN/test
    claim "$OUT" settings
    step average "average checkpoints" average
    step generate "translate the test set (beam $BEAM, length penalty $LENPEN)" generate
    python "$COMMON/score.py" "$OUT" "$DATA/text" "$TARGET" "${options[@]}"
}
