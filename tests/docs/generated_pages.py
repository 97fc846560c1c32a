"""docs/generate.py as a module."""

import importlib.util
import sys

from helpers import ROOT

SPEC = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
generate = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = generate
SPEC.loader.exec_module(generate)
load = generate.load_script
