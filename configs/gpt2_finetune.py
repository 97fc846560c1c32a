"""GPT-2 fine-tuned on Shakespeare, as in nanoGPT: 20 steps of 32,768 tokens at a small constant learning rate.

    python train.py configs/gpt2_finetune.py --gpt2_type=gpt2-xl

The weights are downloaded from the hub. Not measured with this program yet.
"""

init_from = "gpt2"
dataset = "shakespeare"
out_dir = "out/gpt2_finetune"

block_size = 1024
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
warmup_iters = 0

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
