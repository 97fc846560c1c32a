"""GPT-2 124M from scratch on OpenWebText, as nanoGPT reproduces it: half a million tokens per step.

    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m.py

nanoGPT reports a validation loss of about 2.85 after 600,000 steps, four days on 8 A100 GPUs. Not measured with this
program yet.
"""

dataset = "openwebtext"
out_dir = "out/gpt2_124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # GPT-2's 50,257 padded to a multiple of 64

batch_size = 32
gradient_accumulation_steps = 15
max_iters = 600000
learning_rate = 6e-4
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
decay_lr = True
warmup_iters = 2000
lr_decay_iters = max_iters
min_lr = 6e-5

eval_interval = 1000
compile = True
