"""The modern architecture and optimizer in any size: --depth sets all sizes and rates by scaling rules (docs/depth.md).

python train.py configs/depth.py --depth=4 --aspect=32
"""

base = "modern_base.py"

depth = 4

embedding_norm = True
residual_scalars = True

sampling_method = "without_replacement"
muon_momentum = 0.9
wsd_decay_fraction = 0.6
warmup_iters = 5
