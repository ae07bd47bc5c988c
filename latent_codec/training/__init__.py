"""Training: configuration, data, losses and the loop, shared by every model of this project."""
