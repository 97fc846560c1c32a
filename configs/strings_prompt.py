"""Prompt tuning: eight virtual tokens for a task that the input does not name.

    python train.py configs/strings_prompt.py --init_from=out/strings --task_name=reverse \\
        --train_file=data/strings/hidden_train.jsonl --validation_file=data/strings/hidden_val.jsonl

Measurements are in docs/prompt_tuning.md.
"""

objective = "sft"
adapter = "soft_prompt"
prompt_format = "<P*8>{word}>"
target_field = "answer"
max_new_tokens = 14
block_size = 32

batch_size = 64
max_iters = 200
learning_rate = 0.05
weight_decay = 0.0
beta2 = 0.95
warmup_iters = 10

eval_interval = 50
eval_iters = 4
log_interval = 50
dtype = "float32"
