"""Makes Python believe that some packages are not installed: `HACL_WITHOUT=transformer_engine,flash_attn`.

Python imports a module of this name at its start; `tests/gpu/run.sh` puts this folder on PYTHONPATH, so that one
machine shows what a run does with Transformer Engine and without.
"""

import os
import sys

for _name in filter(None, os.environ.get("HACL_WITHOUT", "").split(",")):
    sys.modules[_name] = None  # importing it fails, and looking for it finds nothing
