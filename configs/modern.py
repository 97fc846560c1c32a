"""The modern architecture and optimizer, to combine with a size.

    python train.py configs/modern.py --n_layer=12 --n_head=6 --n_embd=768

Architecture, optimizer and schedule of configs/modern_base.py, with a logit softcap and learning rates.
"""

base = "modern_base.py"

logit_softcap = 15.0

muon_learning_rate = 0.02
learning_rate = 3e-3
wsd_decay_fraction = 0.5
warmup_iters = 10
