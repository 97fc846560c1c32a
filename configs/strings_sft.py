"""SFT on four tasks on short words, which the prompt names: the base model for prompt tuning; 0.6 M parameters.

    python train.py configs/strings_sft.py --out_dir=out/strings

Measurements are in docs/prompt_tuning.md.
"""

objective = "sft"
dataset = "strings"
max_new_tokens = 14

n_layer = 3
n_head = 4
n_embd = 128
block_size = 32
norm = "rmsnorm"
position = "rope"
qk_norm = True
activation = "relu2"
zero_init = True

batch_size = 128
max_iters = 300
optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 3e-3
weight_decay = 0.01
lr_scheduler = "wsd"
lr_decay_iters = max_iters
wsd_decay_fraction = 0.5
warmup_iters = 10
min_lr = 0.0

eval_interval = max_iters
eval_iters = 4
log_interval = 50
dtype = "float32"
