"""FineWeb-Edu (Penedo et al. 2024), its sample of 10 G tokens, in GPT-2's tokens.

python data/fineweb_edu/prepare.py           needs `pip install datasets`; streams, and keeps nothing but the bins
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare import prepare_dataset

if __name__ == "__main__":
    prepare_dataset(
        __file__, __doc__, input=("hf:HuggingFaceFW/fineweb-edu:sample-10BT",), val_fraction=0.001, bad_rows="skip"
    )
