"""Define a case for transformers' own model and configuration tests for every class of this package.

Collected by `compatibility.py`, which puts the tests of transformers' sdist and this package's tests on the path.
"""

from __future__ import annotations

import unittest

import torch
from own_models import FIELDS, Own, V
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor

CHANNELS = 3


class Small:
    """What the tests ask for a config and inputs; named as they name it."""

    batch_size, seq_length, num_hidden_layers, hidden_size, vocab_size, is_training = 5, 7, 2, 16, V, True

    def __init__(self, family: str, fields: dict) -> None:
        self.own, self.fields = Own(f"{family}Model"), fields

    def get_config(self):
        return self.own.config(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        if "num_channels" in self.fields:
            inputs = {"input_values": torch.randn(*shape, CHANNELS)}
        else:
            inputs = {"input_ids": ids_tensor(shape, V - 1)}
        return self.get_config(), inputs | {"attention_mask": torch.ones(shape, dtype=torch.int64)}


class Common(ModelTesterMixin):
    has_attentions = False
    test_torch_exportable = False
    test_can_init_all_missing_weights_before_2023 = True
    family = ""
    fields: dict = {}

    def setUp(self):
        self.model_tester = Small(self.family, self.fields)
        names = ["hidden_size", "num_hidden_layers"]
        config_class = self.all_model_classes[0].config_class
        self.config_tester = ConfigTester(
            self, config_class, has_text_modality=not self.fields, common_properties=names
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class Pairs(Common):
    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return {
            name: torch.stack([value, value.roll(1, 1)], 1) if name in ("input_ids", "attention_mask") else value
            for name, value in inputs.items()
        }


def case(name: str, base: type, family: str, ends: tuple[str, ...], *mixins: type, **attributes):
    classes = tuple(Own(f"{family}{end}").cls for end in ends)
    attributes |= {"family": family, "all_model_classes": classes, "__module__": __name__}
    globals()[name] = type(name, (base, *mixins, unittest.TestCase), attributes)


for each in FIELDS:
    case(each, Common, each, ("Model", "ForCausalLM", "ForSequenceClassification"), GenerationTesterMixin)
    fields = {"num_channels": CHANNELS} | ({"vocab_size": None} if each == "MimoSSM" else {})
    ends = ("Model", "ForSequenceClassification")
    case(f"{each}OfChannels", Common, each, ends, fields=fields, test_resize_embeddings=False)
case("MimoSSMOfPairs", Pairs, "MimoSSM", ("ForSequencePairClassification",))
del Common, Pairs, ModelTesterMixin, each
