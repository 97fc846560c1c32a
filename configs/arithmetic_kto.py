"""KTO on two-digit sums: correct answers are desirable, answers that are off by one undesirable, each of another sum.

    python data/arithmetic/prepare.py --kind=preferences --unpaired=1 --out_dir=data/arithmetic_kto
    python train.py configs/arithmetic_kto.py --init_from=out/sums --out_dir=out/sums_kto

With --unpaired=8 there are eight undesirable answers per desirable one; --desirable_weight=10.6 then keeps the total
weights of both sides at 4 to 3, as they are here. Measurements are in docs/alignment.md.
"""

objective = "kto"
dataset = "arithmetic_kto"
beta = 2.0
desirable_weight = "1.33"
max_new_tokens = 5
block_size = 16

batch_size = 128
max_iters = 300
learning_rate = 6e-5
weight_decay = 0.0
warmup_iters = 10

eval_interval = 100
eval_iters = 4
log_interval = 50
dtype = "float32"
