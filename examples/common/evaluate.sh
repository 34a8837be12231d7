# From checkpoints to scores. A recipe's evaluate.sh sources this, sets its search and calls evaluate.
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

setting METHOD admin "names the default RUN, as in train.sh" method
setting DEPTH 6 "the same" depth
setting SEED 1111 "the same" seed
setting DATA "data/$RECIPE" "the data-bin that prepare.sh made" folder
setting RUN "runs/$RECIPE/$METHOD-$DEPTH-$SEED" "the training's folder; results go to RUN/test" folder
setting LAST 10 "average the newest so many epochs' checkpoints, or as many as there are" whole 1
setting SEARCH_TOKENS 8000 "source tokens a batch, when translating" whole 1024  # no sentence is longer
setting COMET "" "score by COMET, too: the model.ckpt of a model that you have; needs unbabel-comet's comet-score on PATH" path_or_none

# search BEAM LENPEN: the recipe's defaults
search() {
    setting BEAM "$1" "beam size" whole 1
    setting LENPEN "$2" "exponent of the length in the hypotheses' scores" decimal
}

# checkpoints NAMES: RUN's newest LAST of these names, as words NAME@TIME: steps that were given others are done again
checkpoints() {
    find -H "$RUN" -maxdepth 1 -regex ".*/checkpoint$1\.pt" -printf '%f@%T@\n' 2>/dev/null | sort -Vr | head -n "$LAST"
}

# average NAME@TIME...
average() {
    if [ $# -lt "$LAST" ]; then say "note: only $# of $LAST checkpoints are there to average"; fi
    local checkpoint inputs=()
    for checkpoint in "${@%@*}"; do inputs+=("$RUN/$checkpoint"); done
    cd "$REPOSITORY"  # from where modules are imported
    PYTHONPATH=$REPOSITORY python -m admin_fairseq average --inputs "${inputs[@]}" --output "$OUT/average.pt"
}

# generate DICTIONARIES BEAM LENPEN NAME@TIME...
generate() {
    local device=()
    # Python looks for torch in the working directory first: let it be one of ours
    (cd "$REPOSITORY" && python -c "import sys, torch; sys.exit(not torch.cuda.is_available())") || device=(--cpu)
    # the sources alone, or fairseq would leave out those whose reference is too long
    rm -rf "$OUT/sources"
    mkdir "$OUT/sources"
    ln -s "$DATA"/dict.*.txt "$DATA/test.$SOURCE-$TARGET.$SOURCE".* "$OUT/sources"
    # fairseq drops the last batch unless its size is a multiple of --required-batch-size-multiple, and stops at a
    # sentence of more tokens than the model has positions, unless it may leave it out: score.py writes an empty line
    PYTHONUNBUFFERED=1 fairseq-generate "$OUT/sources" --user-dir "$REPOSITORY/admin_fairseq" --path "$OUT/average.pt" \
        --gen-subset test --beam "$2" --lenpen "$3" --post-process subword_nmt --max-tokens "$SEARCH_TOKENS" \
        --required-batch-size-multiple 1 --skip-invalid-size-inputs-valid-test "${device[@]}" 2>"$OUT/generate.err" |
        python "$COMMON/progress.py" "$DATA/text/tok.test.$TARGET" >"$OUT/generate.log" ||
        { tail -n 5 "$OUT/generate.err" >&2; return 1; }
}

# evaluate TEXT OPTIONS... -- "$@": OPTIONS are the recipe's own for score.py
evaluate() {
    local text=$1 checkpoints
    take_options "${@:2}"
    begin "$text" "${ARGUMENTS[@]}"
    need_data
    mapfile -t checkpoints < <(checkpoints '[0-9]+')
    # of a training that ended within its first epoch
    [ ${#checkpoints[@]} != 0 ] || mapfile -t checkpoints < <(checkpoints _last)
    [ ${#checkpoints[@]} != 0 ] || die "$RUN holds no checkpoint; run $(dirname "$0")/train.sh first"
    OUT=$(realpath "$RUN")/test
    claim "$OUT"
    rm -f "$OUT"/*.tmp  # of a run that was killed
    keep_settings "$OUT/settings.json" ""
    step average "average checkpoints" average "${checkpoints[@]}"
    step generate "translate the test set (beam $BEAM, length penalty $LENPEN)" \
        generate "$DICTIONARIES" "$BEAM" "$LENPEN" "${checkpoints[@]}"
    python "$COMMON/score.py" "$OUT" "$DATA/text" "$TARGET" --checkpoints "${checkpoints[@]%@*}" "${OPTIONS[@]}" \
        ${COMET:+--comet "$COMET" --source "$SOURCE"}
}
