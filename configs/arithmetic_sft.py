"""SFT on two-digit sums, stopped early: the initial model of the GRPO, DPO and KTO configs; 0.6 M parameters.

    python train.py configs/arithmetic_sft.py --out_dir=out/sums

--max_iters=400 --lr_decay_iters=400 trains the SFT baseline. Measurements are in docs/alignment.md.
"""

objective = "sft"
dataset = "arithmetic"
max_new_tokens = 5

n_layer = 3
n_head = 4
n_embd = 128
block_size = 16
norm = "rmsnorm"
position = "rope"
qk_norm = True
activation = "relu2"
zero_init = True

batch_size = 128
max_iters = 120
optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 3e-3
weight_decay = 0.01
lr_scheduler = "wsd"
lr_decay_iters = max_iters
wsd_decay_fraction = 0.3
warmup_iters = 10
min_lr = 0.0

eval_interval = max_iters
eval_iters = 4
log_interval = 20
dtype = "float32"
