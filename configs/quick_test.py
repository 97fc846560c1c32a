"""Ten steps of GRPO on GSM8K with a LoRA on GPT-2: shows that all parts of a run work before a long one is started.

    python train.py configs/quick_test.py --out_dir=out/quick_test

GPT-2 (124 M) is downloaded once; another small model is --init_from=PATH. It solves no problem in ten steps: the
rewards for the format and the length are there to be seen moving.
"""

init_from = "gpt2"
objective = "grpo"
adapter = "lora"
dataset = "gsm8k"
reward = "correct:1,format:0.5,length:0.25"
beta = 0.08
num_generations = 4
temperature = 0.9
top_k = 50
max_new_tokens = 32
block_size = 512
overflow = "drop"

batch_size = 4
max_iters = 10
learning_rate = 1e-4
warmup_ratio = 0.1
weight_decay = 0.0
grad_clip = 0.1
lr_scheduler = "linear"
min_lr = 0.0

eval_interval = max_iters
eval_iters = 1
eval_samples = 1
log_interval = 1
