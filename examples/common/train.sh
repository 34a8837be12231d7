# Training of one method at one depth. A recipe's train.sh sources this, sets its hyper-parameters and calls train.
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

setting METHOD admin "how layers are joined: admin, admin_logn, preln, or another of docs/architectures.md" method
setting DEPTH 6 "layers: N in both stacks, E-D, 72 (60-12) or 200 (100-100)" depth
setting SEED 1111 "random seed" seed
setting DATA "data/$RECIPE" "the data-bin that prepare.sh made" folder
setting RUN "runs/$RECIPE/$METHOD-$DEPTH-$SEED" "folder of this training; one that was stopped goes on there" folder
setting PRECISION auto "fp32, fp16 or bf16; auto is fp16 on a GPU" choice auto fp32 fp16 bf16
setting GPUS auto "GPUs to use on this machine, 0 for the CPU; auto is all" whole_or_auto 0
setting NODES 1 "machines; start this script on each" whole 1
setting NODE_RANK 0 "this machine's number, from 0" whole 0
setting MASTER localhost:29500 "host:port of machine 0" address
setting OPTIMIZER radam "radam, novograd or adam" choice radam novograd adam
setting SCHEDULE inverse_sqrt "inverse_sqrt, or linear decay to zero at UPDATES" choice inverse_sqrt linear
setting UPDATES 0 "stop after so many updates; 0: after EPOCHS only" whole 0
setting SAVE_UPDATES 2000 "updates between two checkpoints within an epoch" whole 1
setting EXTRA "" "more options of fairseq-train; they win" words
setting DRY_RUN "" "1: print the command and stop" switch

# hyper_parameters LR WARMUP DROPOUT WEIGHT_DECAY BATCH MAX_TOKENS EPOCHS INIT_WEIGHTS MARGIN: the recipe's defaults
hyper_parameters() {
    setting LR "$1" "peak learning rate" decimal
    setting WARMUP "$2" "updates of linear warmup from 1e-7" whole 0
    setting DROPOUT "$3" "dropout of embeddings and residual branches" decimal
    setting WEIGHT_DECAY "$4" "weight decay" decimal
    setting BATCH "$5" "tokens an update at most, with padding, all GPUs together" whole 1
    setting MAX_TOKENS "$6" "at most so many of them on a GPU at once" whole 1
    setting EPOCHS "$7" "epochs" whole 1
    setting INIT_WEIGHTS "$8" "how weights start: as fairseq's, or as the authors' fairseq 0.8" choice fairseq authors
    setting MARGIN "$9" "the margin K of Admin's pre-pass; the paper's is 1" decimal
}

# architecture ARCH: options for METHOD and DEPTH on top of fairseq's architecture transformer_ARCH
architecture() {
    local name=${1:+_$1} encoder=$DEPTH decoder=$DEPTH
    case $DEPTH in
        72) encoder=60 decoder=12 ;;
        200) encoder=100 decoder=100 ;;
        *-*) encoder=${DEPTH%-*} decoder=${DEPTH#*-} ;;
    esac
    COMMAND+=(--arch "transformer_$METHOD$name"
        --encoder-layers "$encoder" --decoder-layers "$decoder" --init-weights "$INIT_WEIGHTS")
    case $METHOD in
        admin | admin_fixed | admin_scalar)
            [[ $EXTRA =~ --admin-(init[=\ ]+[^p]|profile[=\ ]) ]] || COMMAND+=(--admin-margin "$MARGIN")  # or as EXTRA says
            ;;
    esac
}

# the global batch BATCH in tokens, as updates of FREQUENCY batches of TOKENS on each of the workers
share_batch() {
    local workers
    if [ "$GPUS" = auto ]; then GPUS=$FOUND; fi
    [ "$NODES" = 1 ] || [ "$GPUS" != 0 ] || die "NODES=$NODES needs GPUs"
    workers=$((GPUS > 0 ? GPUS * NODES : 1))
    whole "$workers" BATCH
    FREQUENCY=$(((BATCH + MAX_TOKENS * workers - 1) / (MAX_TOKENS * workers)))
    TOKENS=$((BATCH / (workers * FREQUENCY)))
    SHARES="$workers workers x $TOKENS tokens x update-freq $FREQUENCY"
    say "global batch $BATCH tokens: $SHARES"
    COMMAND+=(--max-tokens "$TOKENS" --update-freq "$FREQUENCY")
    if [ "$OPTIMIZER" = novograd ]; then FP16+=(--fp16-no-flatten-grads); fi  # it looks at whole tensors
    case $PRECISION in
        auto) [ "$GPUS" = 0 ] || COMMAND+=("${FP16[@]}") ;;
        fp16) COMMAND+=("${FP16[@]}") ;;
        bf16) COMMAND+=(--bf16) ;;
    esac
    if [ "$GPUS" = 0 ]; then
        [ "$PRECISION" != fp16 ] || die "PRECISION=fp16 needs a GPU"
        COMMAND+=(--cpu)
    fi
    if [ "$workers" = 1 ]; then
        COMMAND+=(--distributed-world-size 1)
    elif [ "$NODES" = 1 ]; then
        COMMAND+=(--distributed-world-size "$GPUS")
    else
        COMMAND=(torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS"
            --master-addr "${MASTER%:*}" --master-port "${MASTER#*:}" "${COMMAND[@]}")
    fi
}
FP16=(--fp16 --fp16-scale-window 256 --threshold-loss-scale 0.03125)

# fit COMMAND...: run it with its output in RUN/train.log too
fit() {
    local before=$SHARES
    if [ -e "$RUN/.shares" ]; then before=$(cat "$RUN/.shares"); fi
    if [ "$before" = "$SHARES" ]; then python "$COMMON/checkpoints.py" "$RUN"
    else python "$COMMON/checkpoints.py" "$RUN" --whole-epochs; fi
    note "$RUN/.shares" "$SHARES"
    "$@" 2>&1 | tee -a "$RUN/train.log"
}

# train TEXT ARCH OPTIONS... -- "$@": OPTIONS are the recipe's own for fairseq-train
train() {
    local text=$1 arch=$2 words
    take_options "${@:3}"
    begin "$text" "${ARGUMENTS[@]}"
    [ "$NODE_RANK" -lt "$NODES" ] || die "NODE_RANK=$NODE_RANK: machines are numbered from 0 to NODES - 1"
    need_data
    FOUND=$(PYTHONPATH=$REPOSITORY python "$COMMON/methods.py" "$METHOD") || exit 1  # GPUs
    COMMAND=("$(command -v fairseq-train)" "$DATA" --user-dir "$REPOSITORY/admin_fairseq"
        --source-lang "$SOURCE" --target-lang "$TARGET" --share-all-embeddings)
    architecture "$arch"
    COMMAND+=(--dropout "$DROPOUT" --attention-dropout 0.1 --activation-dropout 0.1
        --optimizer "$OPTIMIZER" --adam-betas "(0.9, 0.98)" --weight-decay "$WEIGHT_DECAY" --clip-norm 0
        --lr "$LR" --warmup-updates "$WARMUP" --max-update "$UPDATES"
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1
        --skip-invalid-size-inputs-valid-test)  # as it does with training pairs that are too long for the model
    case $SCHEDULE in
        inverse_sqrt) COMMAND+=(--lr-scheduler inverse_sqrt --warmup-init-lr 1e-7) ;;
        linear)
            [ "$UPDATES" != 0 ] || die "SCHEDULE=linear needs UPDATES, where the learning rate reaches zero"
            COMMAND+=(--lr-scheduler polynomial_decay --total-num-update "$UPDATES")
            ;;
    esac
    share_batch
    # Batches that are made anew in each epoch make a run that was stopped and resumed the same as one that was not.
    COMMAND+=(--max-epoch "$EPOCHS" --seed "$SEED" --update-epoch-batch-itr True --save-dir "$RUN" --keep-last-epochs 10
        --save-interval-updates "$SAVE_UPDATES" --keep-interval-updates 1 --log-format simple --log-interval 100)
    mapfile -d "" words < <(xargs --no-run-if-empty printf '%s\0' <<<"$EXTRA")  # quoted as in a shell
    COMMAND+=("${OPTIONS[@]}" "${words[@]}")
    printf '%q ' "${COMMAND[@]}"
    echo
    if [ -n "$DRY_RUN" ]; then return; fi
    if [ "$NODE_RANK" != 0 ]; then exec "${COMMAND[@]}"; fi
    claim "$RUN"
    keep_settings "$RUN/settings.json" "$(compgen -G "$RUN/checkpoint*.pt" || true)"
    step train "train in $RUN" fit "${COMMAND[@]}"
    say "ready: $RUN"
}
