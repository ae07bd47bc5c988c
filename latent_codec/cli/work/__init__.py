"""The work of each verb: `VERB.run(args)`, loaded after its arguments are accepted. Everything here may import torch."""
