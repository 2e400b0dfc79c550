"""Which Auto class builds the model for which kind of task."""

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

HEADS = {"sequence_classification": AutoModelForSequenceClassification, "causal_lm": AutoModelForCausalLM}
