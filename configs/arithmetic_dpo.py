"""DPO on two-digit sums: correct answers preferred to answers that are off by one.

    python data/arithmetic/prepare.py --kind=preferences --out_dir=data/arithmetic_dpo
    python train.py configs/arithmetic_dpo.py --init_from=out/sums --out_dir=out/sums_dpo

Measurements are in docs/alignment.md.
"""

objective = "dpo"
dataset = "arithmetic_dpo"
beta = 2.0
max_new_tokens = 5
block_size = 16

batch_size = 128
max_iters = 300
learning_rate = 3e-5
weight_decay = 0.0
warmup_iters = 10

eval_interval = 100
eval_iters = 4
log_interval = 50
dtype = "float32"
