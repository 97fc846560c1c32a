"""GRPO on GSM8K with a LoRA on a small chat model: two epochs, four completions for each of four problems a step.

    python train.py configs/gsm8k_grpo.py --init_from=google/gemma-3-1b-it --out_dir=out/gsm8k

The numbers are those of agent_tunix. Begin with configs/quick_test.py, which is this in ten short steps. The whole
run has not been measured with this program yet; docs/smollm2.md has its first steps.
"""

init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
objective = "grpo"
adapter = "lora"
lora_rank = 32
lora_alpha = 32
dataset = "gsm8k"
reward = "correct:1,format:0.5"
beta = 0.08
epsilon = 0.2
num_generations = 4
temperature = 0.9
top_k = 50
max_new_tokens = 512
block_size = 768  # 256 of the prompt
overflow = "drop"

batch_size = 16
max_iters = 3738
learning_rate = 3e-6
warmup_ratio = 0.1
weight_decay = 0.1
beta2 = 0.99
grad_clip = 0.1
lr_scheduler = "cosine"
min_lr = 0.0

checkpoint_interval = 100
eval_interval = 500
eval_iters = 8
log_interval = 10
