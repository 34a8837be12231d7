# Shared by all recipes: settings that document themselves, and steps that survive a kill.
# shellcheck shell=bash

set -euo pipefail

COMMON=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$COMMON/../.." && pwd)
if [ -d "$REPOSITORY/.venv/bin" ]; then PATH="$REPOSITORY/.venv/bin:$PATH"; fi
RECIPE=$(basename "$(cd "$(dirname "$0")" && pwd)")  # for example wmt14_en_de
# shellcheck disable=SC2034  # for the scripts that source this
TARGET=${RECIPE##*_}
SOURCE=${RECIPE%_*} SOURCE=${SOURCE##*_}
SETTINGS=()  # names, in order
declare -A DEFAULTS HELP

die() {
    echo "$(basename "$(dirname "$0")")/$(basename "$0"): error: $*" >&2
    exit 1
}

say() { echo "[$(date +%H:%M:%S)] $*"; }

# setting NAME DEFAULT TEXT: an environment variable, its default and what it is for
setting() {
    SETTINGS+=("$1")
    DEFAULTS[$1]=$2
    HELP[$1]=$3
    if [ -z "${!1+given}" ]; then printf -v "$1" %s "$2"; fi
    export "${1?}"
}

# whole LEAST NAME...: these settings are whole numbers of at least LEAST
whole() {
    local least=$1 name
    shift
    for name in "$@"; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,17})$ && ${!name} -ge $least ]] ||
            die "$name=${!name}: give a whole number of at least $least"
    done
}

# decimal NAME...: these settings are numbers that are not negative
decimal() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || die "$name=${!name}: give a number, not negative"
    done
}

# take_options WORD... -- ARGUMENT...: the words become OPTIONS, the script's own arguments ARGUMENTS
# shellcheck disable=SC2034  # for the scripts that source this
take_options() {
    OPTIONS=()
    while [ "$1" != -- ]; do
        OPTIONS+=("$1")
        shift
    done
    shift
    ARGUMENTS=("$@")
}

# begin TEXT "$@": answer --help, refuse other arguments, check that the programs are there, print every setting
begin() {
    local text=$1 name
    shift
    if [ "${1-}" = --help ] || [ "${1-}" = -h ]; then
        echo "$text"
        echo
        echo "Settings are environment variables, for example: ${SETTINGS[0]}=${DEFAULTS[${SETTINGS[0]}]} $0"
        echo
        for name in "${SETTINGS[@]}"; do printf '  %-14s %s [%s]\n' "$name" "${HELP[$name]}" "${DEFAULTS[$name]}"; done
        exit 0
    fi
    [ $# = 0 ] || die "unknown argument $1; settings are environment variables, see --help"
    command -v fairseq-train >/dev/null || die "fairseq-train is not on PATH; run 'make demo' once, or pip install '.[fairseq]'"
    for name in "${SETTINGS[@]}"; do
        if [ "${!name}" = "${DEFAULTS[$name]}" ]; then printf '  %-14s %s\n' "$name" "${!name}"
        else printf '  %-14s %s (default: %s)\n' "$name" "${!name}" "${DEFAULTS[$name]}"; fi
    done
}

# claim FOLDER: make it this run's own, beside which no second run is started. What a step starts holds the lock too,
# so that a training run whose shell was killed is not joined by a second one.
claim() {
    mkdir -p "$1/.done" || die "cannot make the folder $1"
    DONE=$1/.done
    exec {LOCK}>"$1/.lock"
    flock --nonblock "$LOCK" || die "another run is at work in $1"
}

# the data-bin must be there; DATA may be moved, but its dictionaries are among the settings that stay
need_data() {
    [ -e "$DATA/dict.$TARGET.txt" ] || die "DATA=$DATA is not prepared; run $(dirname "$0")/prepare.sh first"
    DICTIONARIES=$(cat "$DATA"/dict.*.txt | sha256sum | cut -c 1-16)
    export DICTIONARIES
    SETTINGS+=(DICTIONARIES)
}

# keep_settings FILE BEGUN: write every setting as JSON; where something was made with those that are there (BEGUN is not
# empty), refuse others
keep_settings() {
    local replace=--replace
    if [ -n "$2" ]; then replace=; fi
    python "$COMMON/settings.py" "$1" $replace "${SETTINGS[@]}" || exit 1
}

# step NAME TEXT COMMAND...: run it, unless this very command has already ended well here. Whatever a kill left behind
# is overwritten.
step() {
    local name=$1 text=$2 status
    shift 2
    if [ -e "$DONE/$name" ] && [ "$(cat "$DONE/$name")" = "$*" ]; then
        say "$text: already done"
        return
    fi
    rm -f "$DONE/$name"
    say "$text"
    # not "$@" || die: a function called in a condition does not stop at its first failure
    set +e
    (set -e; "$@")
    status=$?
    set -e
    [ $status = 0 ] || die "$text failed; what to do is said above. Run the same command again to go on from here"
    echo "$*" >"$DONE/$name.tmp"
    mv "$DONE/$name.tmp" "$DONE/$name"
}
