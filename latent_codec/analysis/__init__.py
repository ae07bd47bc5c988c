"""What latents are good for besides coming back: features, anomalies, morphs and attributes of images."""
