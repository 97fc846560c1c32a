"""The first run: a small modern GPT learns Python from the standard library's source, in minutes on 2 CPU cores.

    python train.py configs/quickstart.py && python sample.py --out_dir=out/quickstart --start="def "

Reaches a validation loss of 1.42 (2.05 bits per byte) in 70 seconds on 2 CPU cores.
"""

base = "modern_base.py"

dataset = "stdlib_char"
out_dir = "out/quickstart"
plot_loss = True

n_layer = 4
n_head = 3
n_embd = 192
block_size = 128

batch_size = 16
max_iters = 400
muon_learning_rate = 0.02
learning_rate = 3e-3
lr_decay_iters = max_iters
wsd_decay_fraction = 0.5
warmup_iters = 10

eval_interval = 80
eval_iters = 20
log_interval = 10
