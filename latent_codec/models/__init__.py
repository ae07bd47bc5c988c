"""Networks and presets of networks."""
