"""LoRA and DoRA of PEFT around weights that a cut replaces. Knows modules and changes, but no mixer adapters."""
