"""The first run: a small modern GPT learns to write Python from the standard library's source, on 2 CPU cores in minutes.

    python train.py configs/quickstart.py && python sample.py --out_dir=out/quickstart --start="def "

Reaches a validation loss of 1.42 (2.05 bits a byte) in 70 seconds on 2 CPU cores.
"""

dataset = "stdlib_char"
out_dir = "out/quickstart"
plot_loss = True

n_layer = 4
n_head = 3
n_embd = 192
block_size = 128
norm = "rmsnorm_nogain"
position = "rope"
qk_norm = True
activation = "relu2"
zero_init = True
tie_weights = False

batch_size = 16
max_iters = 400
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 3e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
lr_scheduler = "wsd"
lr_decay_iters = max_iters
wsd_decay_fraction = 0.5
warmup_iters = 10
min_lr = 0.0

eval_interval = 80
eval_iters = 20
log_interval = 10
