"""The size of GPT-2 124M with the modern architecture and Muon, on FineWeb-Edu.

    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m_modern.py

12 layers x 768, heads of 128, half a million tokens per step, 1.7 G tokens. modded-nanogpt's record of this kind took
as many to a validation loss of 3.28 on FineWeb, GPT-2's recipe 10 G. Not measured with this program yet.
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
residual_scalars = True
logit_softcap = 15.0

batch_size = 64
gradient_accumulation_steps = 8
sampling_method = "without_replacement"
max_iters = 3250
muon_learning_rate = 0.02
learning_rate = 0.015
embedding_learning_rate = 0.3
head_learning_rate = 0.004
lr_decay_iters = max_iters
wsd_decay_fraction = 0.5
warmup_iters = 0

eval_interval = 250
compile = True
