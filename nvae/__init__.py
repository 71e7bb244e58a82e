"""Deep hierarchical variational autoencoders: train, sample, evaluate."""
