#!/usr/bin/env bash
# The tables of docs/alignment.md and docs/reinforcement.md: sums from fine-tuning to preferences and rewards, three seeds, with controls. Prints accuracies.
#     bash benchmarks/post_training.sh [OUT]
set -euo pipefail
out=${1:-out/post_training}
run() { python train.py "$@" --overwrite > "$out/last.log" 2>&1 || { tail -5 "$out/last.log"; exit 1; }; }
score() { printf '%-28s' "$1"; python evaluate.py --out_dir="$out/$1" --checkpoint=last --tasks arithmetic --data_dir=data 2> /dev/null | grep accuracy; }
mkdir -p "$out"
python data/arithmetic/prepare.py --overwrite > /dev/null
python data/arithmetic/prepare.py --overwrite --kind=preferences --out_dir=data/arithmetic_dpo > /dev/null
for n in 1 8; do python data/arithmetic/prepare.py --overwrite --kind=preferences --unpaired=$n --out_dir=data/arithmetic_kto_$n > /dev/null; done

for seed in 1 2 3; do  # the first checkpoint (one every third step) with an accuracy of 30 %
    run configs/arithmetic_sft.py --seed=$seed --checkpoint_interval=3 --keep_every=3 --out_dir="$out/sft_$seed"
    for step in $(seq 60 3 120); do
        python evaluate.py --out_dir="$out/sft_$seed" --checkpoint=$step --tasks arithmetic > "$out/last.log" 2>&1
        right=$(python -c "import json, sys; print(int(100 * json.load(open(sys.argv[1]))['tasks']['arithmetic']['accuracy']['value']))" "$out/sft_$seed/evaluation.json")
        [ "$right" -lt 30 ] || break
    done
    base="$out/sft_$seed/checkpoints/$(printf %06d "$step")"
    printf '%-28s' "sft_$seed at step $step"; grep accuracy "$out/last.log"
    run configs/arithmetic_grpo.py --seed=$seed --init_from="$base" --out_dir="$out/grpo_$seed"; score grpo_$seed
    run configs/arithmetic_dpo.py --seed=$seed --init_from="$base" --out_dir="$out/dpo_$seed"; score dpo_$seed
    run configs/arithmetic_kto.py --dataset=arithmetic_kto_1 --seed=$seed --init_from="$base" --out_dir="$out/kto_1_$seed"; score kto_1_$seed
    run configs/arithmetic_kto.py --dataset=arithmetic_kto_8 --desirable_weight=10.6 --seed=$seed --init_from="$base" --out_dir="$out/kto_8_$seed"; score kto_8_$seed
done
run configs/arithmetic_grpo.py --seed=3 --learning_rate=0 --muon_learning_rate=0 --max_iters=100 --max_seconds=0 --eval_interval=100 --init_from="$base" --out_dir="$out/grpo_lr_0"; score grpo_lr_0
run configs/arithmetic_grpo.py --seed=3 --reward=benchmarks.shuffled:reward --init_from="$base" --out_dir="$out/grpo_shuffled"; score grpo_shuffled
run configs/arithmetic_sft.py --seed=3 --max_iters=400 --lr_decay_iters=400 --eval_interval=400 --out_dir="$out/sft_long"; score sft_long
