import sys

from latent_codec.cli import main

sys.exit(main())
