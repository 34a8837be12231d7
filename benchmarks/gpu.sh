#!/usr/bin/env bash
# All that only a GPU shows, in nine minutes of one.
#
#   benchmarks/gpu.sh [OUT]             figures into the folder OUT (gpu-report), each as soon as it is known
#   REHEARSE=1 benchmarks/gpu.sh [OUT]  the same on a CPU at toy size: does it run?
#   benchmarks/gpu.sh wheels            where there is a network: into wheels/, what a machine with torch, Triton,
#                                       sacrebleu, scikit-learn, matplotlib and pytest-xdist lacks (21 MB, for Python 3.12)
#
# PYTHON (python3) has torch for this GPU. If it has no fairseq, wheels/ goes into an environment that is thrown away.
# PARTS names what is run, of: tests kernels loss features batches search scale deeper. SECONDS_LEFT (540) is for all of them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "benchmarks/gpu.sh: no ${PYTHON:-python3} here; PYTHON=... says which" && exit 2; }
REHEARSE=${REHEARSE:-}
PARTS=${PARTS:-tests kernels loss features batches search scale deeper}
SECONDS_LEFT=${SECONDS_LEFT:-540}

version() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$2"; }

collect_wheels() {
    local pinned=() tags=() name
    for name in hydra-core omegaconf bitarray antlr4-python3-runtime; do
        pinned+=("$name==$(version "$name" requirements.lock)")
    done
    for name in manylinux_2_28 manylinux_2_17 manylinux2014; do tags+=(--platform "${name}_x86_64"); done
    "$PYTHON" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${tags[@]}" \
        --dest wheels "${pinned[@]:0:3}" "fairseq-fixed==$(version fairseq-fixed requirements-fairseq.txt)" liger-kernel &&
        "$PYTHON" -m pip wheel --no-deps --wheel-dir wheels "${pinned[3]}" && # pure Python, and on PyPI as source alone
        du -sh wheels
}

has_fairseq() { "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("fairseq"))'; }

# An environment that sees PYTHON's packages, even if PYTHON is in one itself, and has wheels/ on top.
install_wheels() {
    "$PYTHON" -m venv --without-pip "$1" || return
    "$PYTHON" - >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth" <<'EOF' || return
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
EOF
    "$PYTHON" -m pip --python "$1/bin/python" install --quiet --no-index --no-deps wheels/*.whl || return
    PYTHON=$1/bin/python
}

# part NAME SECONDS COMMAND...: run it if it is wanted, for as long as there is time
part() {
    local name=$1 left=$((SECONDS_LEFT - SECONDS)) status
    local budget=$(($2 < left && ! ${#REHEARSE} ? $2 : left))
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return
    if ((budget < 20)); then
        echo "== $name: no time left"
        return
    fi
    echo "== $name, after $SECONDS s, at most $budget s"
    timeout --kill-after 5 "$budget" "$@"
    status=$?
    if ((status)); then
        echo "== $name ended with $status$( ((status == 124)) && echo ': its time was over')"
        ((status == 124)) || failed+=" $name"
    fi
}

main() {
    local work=$1 out=$2 failed="" kernel=() loss=() search=() report=() updates=() scale=() tests=() small
    if ! has_fairseq; then
        if ! compgen -G 'wheels/*.whl' >/dev/null; then
            echo "benchmarks/gpu.sh: $PYTHON has no fairseq; where there is a network: benchmarks/gpu.sh wheels"
            return 2
        elif ! install_wheels "$work/venv"; then
            echo "benchmarks/gpu.sh: wheels/ does not go with $("$PYTHON" --version); for 3.12: benchmarks/gpu.sh wheels"
            return 2
        fi
    fi
    export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTHONPATH=$PWD TRITON_CACHE_DIR=$work/triton
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # PYTHON's plugins are not ours
    tests=(tests/commands/test_gpu.py tests/unit/kernel_cases.py)
    if [[ $REHEARSE ]]; then
        export TRITON_INTERPRET=1
        small="--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
        read -ra small <<<"$small"
        tests+=(-n 2 -k 'random_state or evaluation_draws')
        kernel=(--device interpreter --widths 64 --tokens 32 --rounds 1)
        loss=(--device cpu --tokens 16 --words 100 --width 16 --rounds 1)
        updates=(--rounds 1 --threads 1 --length 3 --max-tokens 150)
        report=("${updates[@]}" --rehearse --depths 1-1 -- "${small[@]}")
        search=("${updates[@]}" --depths 1-1 -- "${small[@]}")
        updates=("${search[@]}")
        # fairseq's flat gradients ask for a GPU
        scale=(--cpu --fp16-no-flatten-grads --max-tokens 150 --max-update 5 --log-interval 1 "${small[@]}"
            --encoder-layers 1 --decoder-layers 1)
    else
        command -v nvidia-smi >/dev/null &&
            nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
        tests+=(-n 12 --deselect tests/commands/test_gpu.py::test_kernels) # whose cases are here one by one
        kernel=(--rounds 7 --tokens 4096 16384 65536)
        report=(--rounds 3 --depths 60-12)
        updates=(--rounds 4 --depths 18-18 --device cuda --dtype bf16 --max-tokens 16384)
        search=(--rounds 2 --depths 18-18 --device cuda --dtype bf16 --max-tokens 4096)
        scale=(--max-tokens 8192 --max-update 200 --log-interval 10 --encoder-layers 60 --decoder-layers 12)
    fi
    timeout $((SECONDS_LEFT / 2)) "$PYTHON" benchmarks/ready.py "$work/data" || return 2

    part tests 120 "$PYTHON" -m pytest -p xdist --dist worksteal -vv --tb short --durations 5 "${tests[@]}"
    part kernels 50 "$PYTHON" -m benchmarks.kernel --out "$out/kernel" "${kernel[@]}"
    part loss 60 "$PYTHON" -m benchmarks.loss --out "$out/loss" "${loss[@]}"
    part features 110 "$PYTHON" -m benchmarks.speed "$work/data" --features --no-memory --no-generate \
        --out "$out/features" "${updates[@]}"
    part batches 150 "$PYTHON" -m benchmarks.speed "$work/data" --gpu-report --out "$out/batches" "${report[@]}"
    part search 60 "$PYTHON" -m benchmarks.speed "$work/data" --no-memory --methods postln,admin:off,admin:beams,admin:all \
        --out "$out/search" "${search[@]}"
    part scale 80 "${PYTHON%/*}/fairseq-train" "$work/data" --user-dir admin_fairseq --arch transformer_admin \
        --fp16 --optimizer adam --adam-betas '(0.9, 0.98)' --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-updates 200 \
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --share-all-embeddings --seed 1 \
        --disable-validation --no-save --log-format json "${scale[@]}"
    [[ $REHEARSE ]] || report=(--depths 100-100)
    part deeper 540 "$PYTHON" -m benchmarks.speed "$work/data" --gpu-report --out "$work/deeper" "${report[@]}"

    echo "== after $SECONDS s"
    cat "$out"/*/*.md "$work"/deeper/*.md 2>/dev/null
    grep -E '^(FAILED|ERROR) |^=+ .* in [0-9.]+s' "$out/gpu.log"
    grep -o '"loss_scale": "[^"]*"' "$out/gpu.log" | uniq -c # as it changed
    [[ ! $failed ]] || { echo "failed:$failed" && return 1; }
}

if [[ ${1:-} == -* ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
if [[ ${1:-} == wheels ]]; then
    collect_wheels
    exit
fi
out=$(realpath -m "${1:-gpu-report}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
main "$work" "$out" 2>&1 | tee "$out/gpu.log"
exit "${PIPESTATUS[0]}"
