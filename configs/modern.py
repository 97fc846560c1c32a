"""The modern architecture and optimizer, to put before a size: python train.py configs/modern.py --n_layer=12 --n_head=6 --n_embd=768

RMSNorm without gain, rotary positions, QK-norm, ReLU^2, output projections that start at zero, an untied head with bounded logits;
Muon for the matrices, AdamW for the rest; warm-up, stable, decay (as in modded-nanogpt and nanochat).
"""

base = "modern_base.py"

logit_softcap = 15.0

muon_learning_rate = 0.02
learning_rate = 3e-3
wsd_decay_fraction = 0.5
warmup_iters = 10
