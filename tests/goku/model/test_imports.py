"""What runs on a bare GPU machine imports with torch and numpy alone."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("transformers", "av", "PIL", "rich", "safetensors", "yaml", "tensorboard"):
    sys.modules[name] = None  # importing it now raises ImportError
import goku_kernels, goku.model, goku.flops
assert goku.__version__
"""


def test_the_model_needs_only_torch():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
