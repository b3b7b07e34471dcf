"""Formulas and the network: activations, losses, parameters, labels, forward and backward."""
