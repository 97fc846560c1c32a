"""Prompt tuning for a task from text to text: what the tasks in this folder share. The task is given by its fields:

    python train.py configs/tasks/text2text.py --init_from=gpt2 --task_name=summarization \\
        --train_file=train.jsonl --validation_file=validation.jsonl \\
        --prompt_format='<P*60>{text}<P*20>' --target_field=summary --truncation_field=text

Not measured with this program yet.
"""

objective = "sft"
adapter = "soft_prompt"
prompt_provider = "tensor"
prompt_init = "vocab"

max_tokens = 1024  # of an example: GPT-2's context
block_size = max_tokens
overflow = "drop"
max_new_tokens = 128

batch_size = 4
gradient_accumulation_steps = 8
max_iters = 10_000
learning_rate = 0.1
weight_decay = 0.0
lr_scheduler = "linear"
min_lr = 0.0
warmup_iters = 500

eval_interval = 500
eval_iters = 50
log_interval = 50
