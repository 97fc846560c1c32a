"""Tiny Shakespeare in GPT-2's tokens, the same bins as nanoGPT's: 301,966 tokens to train on, 36,059 to validate.

python data/shakespeare/prepare.py [--input input.txt]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare import prepare_dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

if __name__ == "__main__":
    prepare_dataset(__file__, __doc__, input=(URL,))
