"""Shakespeare by characters on a CPU: below the loss of nanoGPT's CPU recipe, no more parameters, a tenth of its steps.

    python train.py configs/shakespeare_cpu.py

Reaches a validation loss of 1.72 (1.721, 1.716, 1.723 with three seeds, in float32, on all of the validation text)
after 200 steps, 410,000 tokens. There, nanoGPT's recipe of 2,000 steps reaches 1.91, or 1.78 with its learning rate
tuned (benchmarks/cpu.json); this one gets there after 85 and 150 steps.

The modern architecture and optimizer, chosen on the last 100,000 characters of the training text
(benchmarks/ablation.md). RoPE, the untied head, QK-norm, squared ReLU, residual scalars and RMSNorm each lower the
loss, Muon most of all. Embedding norm makes no difference that three seeds show. Value residual and softcap make none
either, and are off.

Muon's high rate and low momentum, the larger initial weights, projections that are not zero at first and the short
warm-up together lower the loss by 0.03 there. The average of the weights hardly changes the last loss, which the
schedule ends at a rate of zero; halfway the loss is about 0.03 lower with it. Weight decay, a momentum warm-up, lower
rates of head and residual scalars, an embedding from N(0, 1), value embeddings and EMA-Nesterov, which larger models
have, gained nothing on a smaller model of this kind.
"""

base = "modern_base.py"

dataset = "shakespeare_char"
out_dir = "out/shakespeare_cpu"

n_layer = 2
n_head = 2
n_embd = 80
mlp_ratio = 3
block_size = 64
embedding_norm = True
zero_init = False
init_std = 0.05  # between PyTorch's default for this width, 1 / sqrt(3 x 80), and what is usual

batch_size = 80
sampling_method = "without_replacement"
max_iters = 200
muon_learning_rate = 0.06
muon_momentum = 0.85  # where modded-nanogpt's warm-up of the momentum begins
learning_rate = 0.015
lr_decay_iters = max_iters
wsd_decay_fraction = 0.7  # as modded-nanogpt's third track
warmup_iters = 1
ema_decay = 0.95

eval_interval = 50
eval_iters = 50
log_interval = 10
