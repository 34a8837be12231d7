# From raw text to a fairseq data-bin. A recipe's prepare.sh sources this, lists its files and settings, and calls prepare.
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FILES=()

setting RAW "raw/$RECIPE" "folder of the downloaded files; what is there already is used" folder
setting DATA "data/$RECIPE" "the data-bin to make (with the text in DATA/text)" folder
setting WORKERS "$(getconf _NPROCESSORS_ONLN)" "processes" whole 1

# file NAME URL [BYTES|-] [md5:... or sha256:...]: one of the recipe's raw files
file() { FILES+=("$*"); }

# what is wrong with the file $1 of the size $2 and checksum $3 (each may be unknown); prints nothing if it is right
fault() {
    local bytes
    bytes=$(stat -c %s "$1")
    if [ "${2:--}" != - ] && [ "$bytes" != "$2" ]; then
        echo "$bytes bytes instead of $2"
    elif [ -n "${3-}" ] && [ "$("${3%%:*}sum" "$1" | cut -d ' ' -f 1)" != "${3#*:}" ]; then
        echo "another ${3%%:*} checksum than published"
    fi
}

# fetch URL FILE: go on with what an earlier run left; from the start where the server cannot (curl's error 33)
fetch() {
    local status=0
    curl --fail --location --retry 3 --continue-at - --progress-bar --output "$2" "$1" || status=$?
    if [ $status = 33 ]; then
        : >"$2"
        status=0
        curl --fail --location --retry 3 --progress-bar --output "$2" "$1" || status=$?
    fi
    return $status
}

download() {
    local entry name url bytes checksum wrong missing=()
    mkdir -p "$RAW"
    for entry in "${FILES[@]}"; do
        read -r name url bytes checksum <<<"$entry"
        if [ -e "$RAW/$name" ]; then
            wrong=$(fault "$RAW/$name" "$bytes" "$checksum")
            [ -z "$wrong" ] || say "note: $RAW/$name has $wrong; it is used as it is"
            continue
        fi
        # two runs may share RAW: whoever comes second waits, and finds the file
        if { exec {PART}>>"$RAW/$name.part"; } 2>/dev/null; then flock "$PART"; fi
        if [ -e "$RAW/$name" ]; then continue; fi
        say "downloading $url"
        if fetch "$url" "$RAW/$name.part"; then
            wrong=$(fault "$RAW/$name.part" "$bytes" "$checksum")
            if [ -z "$wrong" ]; then
                mv "$RAW/$name.part" "$RAW/$name"
                continue
            fi
            echo "$url gave a file with $wrong; it was removed" >&2
            rm "$RAW/$name.part"
        fi
        [ -s "$RAW/$name.part" ] || rm -f "$RAW/$name.part"
        missing+=("  $url -> $RAW/$name")
    done
    if [ ${#missing[@]} != 0 ]; then
        {
            echo "These files are missing. Fetch them on a machine that can, and put them where the arrow points:"
            printf '%s\n' "${missing[@]}"
            echo "or put a corpus of your own there as $RAW/{train,valid,test}.{$SOURCE,$TARGET} (plain or .gz)."
        } >&2
        exit 1
    fi
}

own_corpus() {
    local split language
    for split in train valid test; do
        for language in "$SOURCE" "$TARGET"; do
            [ -e "$RAW/$split.$language" ] || [ -e "$RAW/$split.$language.gz" ] || return 1
        done
    done
}

corpus() { python "$COMMON/corpus.py" "$@"; }

# Steps name no folder, so that DATA can be moved.
extract() { corpus extract "$1" "$SOURCE" "$TARGET" "$RAW" "$TEXT"; }                            # RECIPE
clean() { corpus clean "$SOURCE" "$TARGET" "$TEXT/$1" "$TEXT/$2" "${@:3}"; }                     # FROM TO OPTIONS...
split() { corpus split "$SOURCE" "$TARGET" "$TEXT/$1" "$TEXT/$2" "$TEXT/$3" --every "$4"; }      # FROM TRAIN VALID N

# tokenize SPLIT OPTIONS...: raw.SPLIT to tok.SPLIT
tokenize() {
    local split=$1 language
    shift
    for language in "$SOURCE" "$TARGET"; do
        corpus tokenize "$language" "$TEXT/raw.$split.$language" "$TEXT/tok.$split.$language" --workers "$WORKERS" "$@"
    done
}

# learn_bpe SPLIT: joint, on both sides, source first
learn_bpe() {
    corpus count "$TEXT/$1.$SOURCE" "$TEXT/$1.$TARGET" --output "$TEXT/words" --workers "$WORKERS"
    subword-nmt learn-bpe --dict-input --symbols "$BPE" --input "$TEXT/words" --output "$TEXT/codes.tmp"
    sync "$TEXT/codes.tmp"
    mv -fT "$TEXT/codes.tmp" "$TEXT/codes"
}

# apply_bpe FROM TO WHAT [TARGETS]: WHAT becomes of pairs with a line that is too long for fairseq's models; TARGETS of
# those whose target alone is
apply_bpe() {
    corpus bpe "$TEXT/codes" "$TEXT/$1.$SOURCE" "$TEXT/$2.$SOURCE" --workers "$WORKERS" --too-long "$3"
    corpus bpe "$TEXT/codes" "$TEXT/$1.$TARGET" "$TEXT/$2.$TARGET" --workers "$WORKERS" --too-long "${4-$3}"
}

# binarize PREFIX
binarize() {
    rm -rf "$TEXT"/bin.*
    local made=$TEXT/bin.$$  # a name of its own: processes that outlived a kill must not write into it
    fairseq-preprocess --source-lang "$SOURCE" --target-lang "$TARGET" --joined-dictionary --workers "$WORKERS" \
        --trainpref "$TEXT/$1.train" --validpref "$TEXT/$1.valid" --testpref "$TEXT/bpe.test" --destdir "$made" \
        2>&1 {LOCK}>&- | tee "$TEXT/preprocess.log" {LOCK}>&- |
        sed -un 's/.*[:|] *\(\[[^]]*\] .* sents, .*\)/\1/p' {LOCK}>&- ||
        { tail -n 5 "$TEXT/preprocess.log" >&2; return 1; }
    sync "$made"/*
    mv "$made"/* "$DATA/"
    rmdir "$made"
}

# prepare TEXT "$@": before it, a recipe sets the arrays TOKENIZE, TOKENIZE_TEST, CLEAN_TOKENS and CLEAN_BPE (options of
# corpus.py; empty: the step is left out) and VALID_EVERY (empty: the validation text is a file of its own)
TOKENIZE=() TOKENIZE_TEST=() CLEAN_TOKENS=() CLEAN_BPE=() VALID_EVERY=
prepare() {
    local text=$1 name=$RECIPE train=tok valid=tok bpe=bpe part left_out="training leaves them out"
    shift
    begin "$text" "$@"
    claim "$DATA"
    keep_settings "$DATA/prepare.json" "$(ls "$DONE")"
    TEXT=$DATA/text
    mkdir -p "$TEXT"
    rm -f "$TEXT"/*.tmp  # of a run that was killed
    if [ -e "$DONE/extract" ]; then read -r _ name <"$DONE/extract"  # RAW may be gone by now
    elif own_corpus; then name=own
    else download; fi
    if [ "$name" = own ]; then
        say "$RAW holds {train,valid,test}.{$SOURCE,$TARGET}: that corpus is used instead of the published one"
        VALID_EVERY=
    fi
    step extract "raw text" extract "$name"
    step tokenize-train "tokenise the training text" tokenize train "${TOKENIZE[@]}"
    [ -n "$VALID_EVERY" ] || step tokenize-valid "tokenise the validation text" tokenize valid "${TOKENIZE[@]}"
    step tokenize-test "tokenise the test text" tokenize test "${TOKENIZE_TEST[@]}"
    if [ ${#CLEAN_TOKENS[@]} != 0 ]; then
        step clean-tokens "clean the training text" clean tok.train clean.train "${CLEAN_TOKENS[@]}"
        train=clean
    fi
    if [ -n "$VALID_EVERY" ]; then
        step split "take every ${VALID_EVERY}th pair for validation" \
            split "$train.train" split.train split.valid "$VALID_EVERY"
        train=split valid=split
    fi
    step learn-bpe "learn $BPE joint BPE merges" learn_bpe "$train.train"
    step bpe-train "apply BPE to the training text" apply_bpe "$train.train" bpe.train "$left_out"
    step bpe-valid "apply BPE to the validation text" apply_bpe "$valid.valid" bpe.valid "$left_out"
    step bpe-test "apply BPE to the test text" apply_bpe tok.test bpe.test \
        "evaluate.sh gives no translation for them" "evaluate.sh scores them as all others"
    if [ ${#CLEAN_BPE[@]} != 0 ]; then
        for part in train valid; do
            step "clean-$part" "clean $part" clean "bpe.$part" "short.$part" "${CLEAN_BPE[@]}"
        done
        bpe=short
    fi
    step binarize "binarise" binarize "$bpe"
    say "ready: $DATA"
}
