"""Shakespeare by characters on a CPU: below the loss of nanoGPT's CPU recipe, no more parameters, a tenth of its steps.

    python train.py configs/shakespeare_cpu.py

Reaches a validation loss of 1.75 (1.752, 1.754, 1.757 with three seeds, on all of the validation text) after 200 steps,
410,000 tokens, in 15 seconds on 2 CPU cores. There, nanoGPT's recipe of 2,000 steps reaches 1.91, or 1.78 with its
learning rate tuned, in 84 to 98 seconds (benchmarks/cpu.json).

The modern architecture and optimizer, chosen on the last 100,000 characters of the training text
(benchmarks/ablation.md). RoPE, the untied head, QK-norm, squared ReLU, residual scalars and RMSNorm each lower the
loss, Muon most of all. Embedding norm and zero-initialized projections make no difference that three seeds show. Value
residual and softcap make none either, and are off.
"""

base = "modern_base.py"

dataset = "shakespeare_char"
out_dir = "out/shakespeare_cpu"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
embedding_norm = True
residual_scalars = True

batch_size = 32
sampling_method = "without_replacement"
max_iters = 200
muon_learning_rate = 0.03
muon_momentum = 0.9
learning_rate = 0.015
lr_decay_iters = max_iters
wsd_decay_fraction = 0.9
warmup_iters = 5

eval_interval = 50
eval_iters = 50
log_interval = 10
