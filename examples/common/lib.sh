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

# claim FOLDER: make it this run's own, beside which no second run is started
claim() {
    mkdir -p "$1/.done" || die "cannot make the folder $1"
    DONE=$1/.done
    exec {LOCK}>"$1/.lock"
    flock --nonblock "$LOCK" || die "another run is at work in $1"
}

# keep_settings FILE [--replace]: write every setting as JSON; refuse others than those that are there, or replace them
keep_settings() { python "$COMMON/settings.py" "$@" "${SETTINGS[@]}" || exit 1; }

# step NAME TEXT COMMAND...: run it, unless this very command has already ended well here. Whatever a kill left behind
# is overwritten.
step() {
    local name=$1 text=$2
    shift 2
    if [ -e "$DONE/$name" ] && [ "$(cat "$DONE/$name")" = "$*" ]; then
        say "$text: already done"
        return
    fi
    rm -f "$DONE/$name"
    say "$text"
    "$@" || die "$text failed; what to do is said above. Run the same command again to go on from here"
    echo "$*" >"$DONE/$name"
}
