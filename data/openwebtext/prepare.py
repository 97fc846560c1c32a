"""OpenWebText in GPT-2's tokens, a document after the other: about 9 G tokens of 8 M documents.

python data/openwebtext/prepare.py           needs `pip install datasets`; streams, and keeps nothing but the bins
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare import prepare_dataset

if __name__ == "__main__":
    prepare_dataset(__file__, __doc__, input=("hf:Skylion007/openwebtext",), val_fraction=0.0005, bad_rows="skip")
