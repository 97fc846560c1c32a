#!/bin/bash
# All measurements on one CUDA GPU, in under half an hour; writes benchmarks/<gpu>.json and benchmarks/gpu.log.
#
#     benchmarks/gpu.sh ../nanoGPT                 a checkout of nanoGPT; its own script has prepared data/shakespeare_char
#     DEVICE=cpu PAIRS=1 STEPS=4 CASES=tiny RACE_STEPS=20 SHAPE="--n_layer=2 --n_embd=64 --n_head=2 --block_size=32" BATCH=2 OUT=/tmp/x benchmarks/gpu.sh ../nanoGPT
#                                                  a rehearsal on a machine without a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
peer=$1 device=${DEVICE:-cuda} pairs=${PAIRS:-5} steps=${STEPS:-30} out=${OUT:-benchmarks} batch=${BATCH:-32}
shape=${SHAPE:-"--n_layer=12 --n_embd=768 --n_head=12 --block_size=1024"}
python=${PYTHON:-python3}
mkdir -p "$out"
exec > >(tee "$out/gpu.log") 2>&1

train() {  # a short run of this program; prints its last two training lines
    "$python" train.py "$@" --device="$device" --dataset=shakespeare_char --data_dir="$peer/data" --max_iters="$steps" --eval_iters=1 --eval_interval=100000 --log_interval=2 \
        --out_dir="$out/gpu_run" --overwrite | grep "^step [0-9]*: loss .* ms" | tail -2
    rm -rf "$out/gpu_run"
}

echo "== attention kernels: GPT-2's shape, ms a step"
for kernel in auto $([ "$device" = cuda ] && echo flash cudnn efficient); do
    echo "-- $kernel"
    train $shape --batch_size="$batch" --compile --attention_kernel="$kernel" || echo "this kernel is not available here"
done
echo "== the modern recipe against GPT-2's, same shape and batch"
echo "-- gpt2"; train configs/gpt2_124m.py $shape --batch_size="$batch" --gradient_accumulation_steps=1 --lr_decay_iters="$steps" --warmup_iters=1
echo "-- modern"; train configs/gpt2_124m_modern.py $shape --batch_size="$batch" --gradient_accumulation_steps=1 --lr_decay_iters="$steps"

echo "== in turn with the peer"
"$python" bench.py train --peer="$peer" --device="$device" --pairs="$pairs" --steps="$steps" --out="$out" ${CASES:+--cases=$CASES}
"$python" bench.py sample --peer="$peer" --device="$device" --pairs="$pairs" --out="$out" ${CASES:+--cases=$CASES}
"$python" bench.py startup --peer="$peer" --device="$device" --pairs="$pairs" --out="$out"
"$python" bench.py race --peer="$peer" --device="$device" --seeds="$((pairs < 3 ? pairs : 3))" --peer_iters="${RACE_STEPS:-2000}" --out="$out"
