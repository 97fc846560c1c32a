"""The modern architecture and optimizer, to put before a size: python train.py configs/modern.py --n_layer=12 --n_head=6 --n_embd=768

RMSNorm without gain, rotary positions, QK-norm, ReLU^2, output projections that start at zero, an untied head with bounded logits;
Muon for the matrices, AdamW for the rest; warm-up, stable, decay (as in modded-nanogpt and nanochat).
"""

norm = "rmsnorm_nogain"
position = "rope"
qk_norm = True
activation = "relu2"
zero_init = True
tie_weights = False
logit_softcap = 15.0

optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 3e-3
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
lr_scheduler = "wsd"
wsd_decay_fraction = 0.5
min_lr = 0.0
warmup_iters = 10
