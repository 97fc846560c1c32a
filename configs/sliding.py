"""Three sliding-window layers per full-attention layer, without position encoding: the windows carry locality.

python train.py configs/sliding.py --dataset=stdlib_char --block_size=512 --window_size=64 --out_dir=out/sliding
"""

position = "none"
window = "SSSL"
