"""The stages of training: one LightningModule for each.

`base` holds the shared parts: network, steps and optimizer.
"""
