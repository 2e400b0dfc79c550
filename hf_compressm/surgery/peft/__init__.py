"""PEFT's adapters (LoRA, DoRA) around the weights that a cut replaces."""
