"""Shakespeare by characters on a CPU: below the loss of nanoGPT's CPU recipe in a seventh of its seconds.

    python train.py configs/shakespeare_cpu.py

Reaches a validation loss of 1.72 (1.719, 1.713, 1.718 with three seeds, in float32, on all of the validation text)
after 200 steps, 1,024,000 tokens, 12 s on 2 cores. There, nanoGPT's recipe of 2,000 steps reaches 1.91 in 91 s, or 1.77
in 93 s with its learning rate tuned (benchmarks/cpu.json); this one gets there after 70 and 140 steps, 4.5 and 8.2 s.

The modern architecture and optimizer, chosen on the last 100,000 characters of the training text for the fewest seconds
to those losses. What each choice is worth after 200 steps is in benchmarks/ablation.md:
- A small model reads more text in the same time: 138,400 parameters, a sixth of nanoGPT's. Its shape, with batches of
  32 rows, ends with the same loss after twice the time. At these rates small batches are noisy.
- Muon, its rate of 0.06 instead of 0.03, the untied head, embedding norm, RoPE and WSD instead of a cosine each lower
  the loss.
- QK-norm lowers it a little. Squared ReLU instead of GELU, RMSNorm, Muon's lower momentum, projections not zero at
  first and the average of the weights make no difference that five seeds show. Nor do value residual, softcap,
  residual scalars, cautious weight decay and an embedding from N(0, 1), which are off. Weight decay and a momentum
  warm-up raise the loss.
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
init_std = 0.05  # kept from a width of 128, where it is PyTorch's default, 1 / sqrt(3 x 128)

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
