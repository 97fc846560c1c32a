"""Prompt tuning for detoxification: rows with the fields toxic and polite.

    python train.py configs/tasks/detoxification.py --init_from=gpt2 \\
        --train_file=train.jsonl --validation_file=validation.jsonl
    python sample.py --prompt_dir=outputs/detoxification/DATE_TIME --fields '{"toxic": "..."}'

Not measured with this program yet.
"""

base = "text2text.py"
task_name = "detoxification"
prompt_format = "<P*60>{toxic}<P*20>"
target_field = "polite"
truncation_field = "toxic"
