"""The base of the modern configs: architecture, optimizer and schedule, without size and learning rates.

RMSNorm without gain, RoPE, QK-norm, squared ReLU, zero-initialized output projections, an untied head. Muon for hidden
matrices, AdamW for the rest. Warmup, stable, decay to zero. (As in modded-nanogpt and nanochat.)
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
