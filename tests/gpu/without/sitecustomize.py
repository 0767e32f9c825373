"""Makes Python believe that some packages are not installed: `HACL_WITHOUT=transformer_engine,flash_attn`.

Python imports a module of this name at its start; `tests/gpu/run.sh` puts this folder on PYTHONPATH, so that one
machine shows what a run does with Transformer Engine and without.
"""

import importlib.abc
import os
import sys

_HIDDEN = {name for name in os.environ.get("HACL_WITHOUT", "").split(",") if name}


class _Hides(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in _HIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r}: hidden by HACL_WITHOUT", name=fullname)
        return None


if _HIDDEN:
    sys.meta_path.insert(0, _Hides())
