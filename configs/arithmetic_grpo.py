"""GRPO on two-digit sums: starts from a model that solves a third to a half of them; three minutes on 2 CPU cores.

    python train.py configs/arithmetic_grpo.py --init_from=out/sums/checkpoints/000099 --out_dir=out/sums_grpo
    python evaluate.py --out_dir=out/sums_grpo --tasks arithmetic

Measurements are in docs/reinforcement.md.
"""

objective = "grpo"
dataset = "arithmetic"
reward = "correct:1"
beta = 0.3  # large enough that shuffled rewards do not change the model
num_generations = 8
max_new_tokens = 5
block_size = 16

batch_size = 256
max_seconds = 180.0
max_iters = 900
optimizer = "muon"
muon_learning_rate = 5e-4
learning_rate = 5e-4
weight_decay = 0.0
lr_scheduler = "linear"
lr_decay_iters = max_iters
min_lr = 0.0
warmup_iters = 20

eval_interval = 200
eval_iters = 1
log_interval = 20
dtype = "float32"
