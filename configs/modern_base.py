"""What the modern configs share: architecture, optimizer and schedule, without size and learning rates. A base for others.

RMSNorm without gain, RoPE, QK-norm, squared ReLU, zero-initialized output projections, an untied head; Muon for hidden
matrices, AdamW for the rest; warmup, stable, decay to zero (as in modded-nanogpt and nanochat).
"""

norm = "rmsnorm_nogain"
position = "rope"
qk_norm = True
activation = "relu2"
zero_init = True
tie_weights = False

optimizer = "muon"
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
lr_scheduler = "wsd"
min_lr = 0.0
