"""Fresh processes of this checkout, for what is measured of a whole process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# As tests/conftest.py does it: `pipelines` and `conversion` are next to the package in a checkout.
_USE_CHECKOUT = """
import sys
from pathlib import Path
import latent_codec
root = Path(sys.argv.pop(1))
assert Path(latent_codec.__file__).parent.parent == root, f"measuring {latent_codec.__file__}, not {root}"
latent_codec.__path__.append(str(root))
"""


def run_script(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run Python code with `arguments` in a process of its own, which imports this checkout whatever is installed.

    Raises:
        AssertionError: if it fails; the message is all that it wrote on stderr.
    """
    path = [str(ROOT), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", _USE_CHECKOUT + script, str(ROOT), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"the process ended with exit code {done.returncode}:\n{done.stderr}"
    return done
