# Shared by all recipes: settings that document themselves, and steps that survive a kill.
# shellcheck shell=bash

set -euo pipefail
unset CDPATH GLOBIGNORE POSIXLY_CORRECT  # of the user's shell: cd would print, globs would leave files out

COMMON=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$COMMON/../.." && pwd)
if [ -d "$REPOSITORY/.venv/bin" ]; then PATH="$REPOSITORY/.venv/bin:$PATH"; fi
RECIPE=$(basename "$(cd "$(dirname "$0")" && pwd)")  # for example wmt14_en_de
# shellcheck disable=SC2034  # for the scripts that source this
TARGET=${RECIPE##*_}
SOURCE=${RECIPE%_*} SOURCE=${SOURCE##*_}
SETTINGS=()  # names, in order
declare -A DEFAULTS HELP KIND

die() {
    echo "$(basename "$(dirname "$0")")/$(basename "$0"): error: $*" >&2
    exit 1
}

say() { echo "[$(date +%H:%M:%S)] $*"; }

# setting NAME DEFAULT TEXT KIND...: an environment variable, its default, what it is for, and what must be true of it:
# one of the functions below, with arguments
setting() {
    SETTINGS+=("$1")
    DEFAULTS[$1]=$2
    HELP[$1]=$3
    KIND[$1]="$4 ${*:5}"
    if [ -z "${!1+given}" ]; then printf -v "$1" %s "$2"; fi
    export "${1?}"
}

# whole LEAST NAME: the setting is a whole number of at least LEAST
whole() {
    [[ ${!2} =~ ^(0|[1-9][0-9]{0,17})$ && ${!2} -ge $1 ]] || die "$2=${!2}: give a whole number of at least $1"
}

# seed NAME: numpy's end at 2^32 - 1, and fairseq adds the epoch
seed() { [[ ${!1} =~ ^(0|[1-9][0-9]{0,8}|[123][0-9]{9})$ ]] || die "$1=${!1}: give a whole number below 4000000000"; }

# whole_or_auto LEAST NAME
whole_or_auto() { [ "${!2}" = auto ] || whole "$@"; }

# decimal NAME: it is a number that is not negative
decimal() {
    [[ ${!1} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || die "$1=${!1}: give a number, not negative"
}

# choice VALUE... NAME: it is one of these values
choice() {
    local name=${*: -1} value
    for value in "${@:1:$#-1}"; do
        if [ "${!name}" = "$value" ]; then return; fi
    done
    die "$name=${!name}: choose one of ${*:1:$#-1}"
}

# switch NAME: it is empty or 1
switch() { [[ ${!1} =~ ^1?$ ]] || die "$1=${!1}: give 1, or nothing"; }

# method NAME: it could be the name of a method; train.sh asks the plugin whether it is one
method() { [[ ${!1} =~ ^[a-z0-9_]+$ ]] || die "$1=${!1}: give the name of one method"; }

# depth NAME
depth() {
    [[ ${!1} =~ ^[1-9][0-9]{0,3}(-[1-9][0-9]{0,3})?$ ]] || die "$1=${!1}: give a number of layers, or E-D"
}

# address NAME
address() { [[ ${!1} =~ ^[A-Za-z0-9][A-Za-z0-9._-]*:[0-9]{1,5}$ ]] || die "$1=${!1}: give host:port"; }

# words NAME: they can be told apart as a shell would, with every quote closed
words() { xargs --no-run-if-empty true <<<"${!1}" 2>/dev/null || die "$1=${!1}: a quote is not closed"; }

# folder NAME: a path, which becomes absolute. Nothing takes it for an option then, and no file that lies there is run.
folder() {
    case ${!1} in
        "") die "$1 is empty: give a folder, or leave it unset" ;;
        -*) die "$1=${!1}: a path must not begin with a dash; if you mean it, write ./${!1}" ;;
        /*) ;;
        *) printf -v "$1" %s "$PWD/${!1}" ;;
    esac
    [[ ${!1} != *[:$'\n']* ]] || die "$1=${!1}: fairseq takes no path with a colon or the end of a line in it"
}

# path_or_none NAME
path_or_none() { [ -z "${!1}" ] || folder "$1"; }

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
    # shellcheck disable=SC2086  # a kind and its arguments
    for name in "${SETTINGS[@]}"; do ${KIND[$name]} "$name"; done
}

# claim FOLDER: make it this run's own, beside which no second run is started. What a step starts holds the lock too,
# so that a training run whose shell was killed is not joined by a second one; what was killed takes a moment to end.
claim() {
    mkdir -p "$1/.done" || die "cannot make the folder $1"
    DONE=$1/.done
    [ ! -e "$1/.lock" ] || [ -f "$1/.lock" ] || die "$1/.lock is not a file"
    exec {LOCK}>>"$1/.lock" || die "cannot write to $1"
    flock --wait 3 "$LOCK" || die "another run is at work in $1"
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

# note FILE TEXT: a small file that appears whole or not at all
note() {
    echo "$2" >"$1.tmp"
    sync "$1.tmp"
    mv -fT "$1.tmp" "$1"
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
    note "$DONE/$name" "$*"
}
