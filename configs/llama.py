"""Llama's architecture, to combine with a size.

    python train.py configs/llama.py --n_layer=12 --n_embd=768 --n_head=12 --n_kv_head=4

RMSNorm with gain, RoPE, SwiGLU with as many parameters as a plain MLP, grouped-query attention with two query heads per
key/value head, an untied head.
"""

norm = "rmsnorm"
position = "rope"
mlp = "gated"
activation = "silu"
mlp_ratio = 8 / 3
n_head = 6
n_kv_head = 3
tie_weights = False
qk_norm = False  # this and the next two: llama.cpp's Llama has none of them, and --time_budget would set them
embedding_norm = False
residual_scalars = False
