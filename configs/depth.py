"""The modern architecture and optimizer with one dial for the size; --depth makes the rest (docs/depth.md).

python train.py configs/depth.py --depth=4 --aspect=32
"""

depth = 4

norm = "rmsnorm_nogain"
position = "rope"
qk_norm = True
activation = "relu2"
embedding_norm = True
residual_scalars = True
zero_init = True
tie_weights = False

sampling_method = "without_replacement"
optimizer = "muon"
muon_momentum = 0.9
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
lr_scheduler = "wsd"
wsd_decay_fraction = 0.6
warmup_iters = 5
min_lr = 0.0
