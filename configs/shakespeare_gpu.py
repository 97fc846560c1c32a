"""Shakespeare by characters on one GPU: nanoGPT's 10.7 M parameters with the modern architecture and optimizer.

    python train.py configs/shakespeare_gpu.py

nanoGPT reports a validation loss of 1.47 after 5,000 steps of this size. Not measured with this program yet.
"""

base = "modern_base.py"

dataset = "shakespeare_char"
out_dir = "out/shakespeare_gpu"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
embedding_norm = True
residual_scalars = True
dropout = 0.2

batch_size = 64
sampling_method = "without_replacement"
max_iters = 600
muon_learning_rate = 0.02
muon_momentum = 0.9
learning_rate = 0.01
lr_decay_iters = max_iters
wsd_decay_fraction = 0.9
warmup_iters = 10

eval_interval = 100
eval_iters = 50
compile = True
