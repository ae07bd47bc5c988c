"""The package imports where Unix modules are missing: on Windows, and in part on macOS."""

from helpers import ROOT
from helpers.processes import run_forked

UNIX_ONLY = (
    "fcntl",
    "resource",
    "termios",
    "tty",
    "pty",
    "pwd",
    "grp",
    "syslog",
    "posix_ipc",
    "readline",
    "crypt",
)

# Libraries import some of these, each knowing what to do without: only our own imports are refused.
SCRIPT = """
import builtins, importlib, sys
missing, modules = sys.argv[1].split(","), sys.argv[2].split(",")
real = builtins.__import__
def refuse(name, globals=None, *rest, **named):
    if name in missing and (globals or {}).get("__name__", "").split(".")[0] == "latent_codec":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *rest, **named)
builtins.__import__ = refuse
for module in modules:
    importlib.import_module(module)
print(len(modules))
"""


def test_every_module_imports_without_what_only_unix_has():
    files = [(path, path.relative_to(ROOT)) for path in (ROOT / "latent_codec").rglob("*.py")]
    for package in ("conversion", "pipelines"):
        files += [(path, "latent_codec" / path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")]
    modules = sorted(
        ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        for path, name in files
        if path.stem != "__main__"
    )
    assert {"latent_codec.cli.train", "latent_codec.training.run_lock", "latent_codec.files"} <= set(modules)
    process = run_forked(SCRIPT, ",".join(UNIX_ONLY), ",".join(modules))
    assert process.stdout.strip() == str(len(modules))
