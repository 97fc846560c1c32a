"""Three layers with a short window to one with a long one, and no positions: the windows tell near from far.

python train.py configs/sliding.py --dataset=stdlib_char --block_size=512 --window_size=64 --out_dir=out/sliding
"""

position = "none"
window = "SSSL"
