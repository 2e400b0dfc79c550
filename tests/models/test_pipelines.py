"""Pipelines of transformers with every class of this package, by hand against the model, and saved and loaded."""

import logging

import pytest
import torch
from own_models import CAUSAL, CLASSIFIERS, MODELS, Own, V
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

WORDS = [f"w{number}" for number in range(2, V)]
TEXTS = ["w5 w9 w3", "w8 w8 w20 w4 w6"]
SINGLE = [name for name in CLASSIFIERS if "Pair" not in name]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<pad>", "?", *WORDS])}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="<pad>", padding_side="left")


def from_folder(task, name, tokenizer, folder, **fields):
    """A pipeline over what was saved, as a user has it."""
    model = Own(name).model(**fields).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, pipeline(task, model=str(folder), tokenizer=str(folder), device="cpu")


@pytest.fixture(autouse=True)
def unsupported(caplog):
    """Whatever a pipeline says of models that it does not support is an error."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert "not supported for" not in caplog.text


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation(name, batch_size, tokenizer, tmp_path):
    model, generate = from_folder("text-generation", name, tokenizer, tmp_path)
    found = generate(TEXTS, max_new_tokens=4, do_sample=False, batch_size=batch_size, return_tensors=True)
    for text, [answer] in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
        assert [token for token in answer["generated_token_ids"] if token] == [token for token in expected if token]


@pytest.mark.parametrize("name", SINGLE)
def test_text_classification(name, tokenizer, tmp_path):
    model, classify = from_folder("text-classification", name, tokenizer, tmp_path, num_labels=3)
    for batch_size in (1, 2):
        for text, scores in zip(TEXTS, classify(TEXTS, top_k=None, batch_size=batch_size), strict=True):
            logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
            found = {each["label"]: each["score"] for each in scores}
            expected = dict(zip(("LABEL_0", "LABEL_1", "LABEL_2"), logits.softmax(-1).tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_feature_extraction(name, tokenizer, tmp_path):
    model, extract = from_folder("feature-extraction", name, tokenizer, tmp_path)
    found = extract(TEXTS[1], return_tensors=True)
    expected = model(torch.tensor([tokenizer(TEXTS[1])["input_ids"]])).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_classifier_of_pairs_says_what_it_reads(tokenizer):
    model = Own("MimoSSMForSequencePairClassification").model()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="input_ids must hold pairs"):
        classify(TEXTS[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_tokenizers_are_found_beside_the_model(name, tokenizer, tmp_path):
    Own(name).config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
