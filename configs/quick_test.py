"""Ten short steps of configs/gsm8k_grpo.py: shows that all parts of a run work before a long one is started.

    python train.py configs/quick_test.py --out_dir=out/quick_test

The model (135 M) is downloaded once; another one is --init_from=ORG/NAME or a PATH. It solves no problem in ten steps:
the rewards for the format and the length are there to be seen moving.
"""

base = "gsm8k_grpo.py"

reward = "correct:1,format:0.5,length:0.25"
max_new_tokens = 32
block_size = 512

batch_size = 4
max_iters = 10
learning_rate = 1e-4
weight_decay = 0.0
lr_scheduler = "linear"

checkpoint_interval = 0
eval_interval = max_iters
eval_iters = 1
eval_samples = 1
log_interval = 1
