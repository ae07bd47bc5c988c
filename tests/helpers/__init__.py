"""What several test files need: small networks, images, trainings, commands and processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
