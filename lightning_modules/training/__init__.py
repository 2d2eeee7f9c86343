"""The stages of training, one LightningModule each.

`base` has what they share: network, steps, optimizer.
"""
