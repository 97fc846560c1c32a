"""The size of GPT-2 124M with the modern architecture and Muon, on FineWeb-Edu.

    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m_modern.py

12 layers x 768, heads of 128, half a million tokens per step, 1.7 G tokens. The rates, decays, epsilon, initial
embedding, attention scale, half-truncated RoPE and schedule are those of the tuned Muon baseline in modded-nanogpt's
third track (result 36, commit f411b3d), which takes as many tokens to a validation loss of 3.28 on FineWeb, where
GPT-2's recipe takes 10 G. That model has biases and gains, and no residual scalars. Not measured with this program, nor
comparable with 3.28: FineWeb-Edu is another text.
"""

base = "modern_base.py"

dataset = "fineweb_edu"
out_dir = "out/gpt2_124m_modern"

n_layer = 12
n_head = 6
n_embd = 768
block_size = 1024
vocab_size = 50304  # GPT-2's 50,257 padded to a multiple of 64
embedding_norm = True
embedding_init_std = 1.0
residual_scalars = True
attention_scale = 0.12
rotary_fraction = 0.5
rope_base = 1024.0
logit_softcap = 15.0

batch_size = 64
gradient_accumulation_steps = 8
sampling_method = "without_replacement"
max_iters = 3250
muon_learning_rate = 0.025
muon_weight_decay = 0.05
learning_rate = 0.015  # of vectors
embedding_learning_rate = 0.7
head_learning_rate = 0.004
weight_decay = 0.001
aux_eps = 1e-10
grad_clip = 0.0
lr_decay_iters = max_iters
wsd_decay_fraction = 0.7
warmup_iters = 0

eval_interval = 250
compile = True
