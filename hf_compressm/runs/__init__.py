"""A whole run from a file or a command line: pretraining, fine-tuning, evaluation, compression of a saved model."""
