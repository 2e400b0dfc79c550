"""TRL's trainers, unmodified, through cuts: supervised fine-tuning in its forms, and preferences."""

import pytest
import torch
from datasets import Dataset
from selective_models import OWN, STOCK, make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.surgery import history

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

STEPS, CUTS = 8, [2, 5]
WORDS = [f"w{i}" for i in range(46)]
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_length": 24,
}


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def words(i, length):
    return " ".join(WORDS[(7 * i + 3 * k) % len(WORDS)] for k in range(length))


DATA = {
    "text": lambda: Dataset.from_list([{"text": words(i, 3 + i % 9)} for i in range(64)]),
    "completion": lambda: Dataset.from_list(
        [{"prompt": words(i, 2 + i % 5), "completion": " " + words(i + 1, 2 + i % 7)} for i in range(64)]
    ),
    "preference": lambda: Dataset.from_list(
        [
            {"prompt": words(i, 2 + i % 5), "chosen": " " + words(i + 1, 5), "rejected": " " + words(i + 2, 2 + i % 4)}
            for i in range(64)
        ]
    ),
}
SFT = {
    "plain": ("text", {}),
    "completion-only": ("completion", {"completion_only_loss": True}),
    "packed": ("text", {"packing": True}),
    "wrapped": ("text", {"packing": True, "packing_strategy": "wrapped"}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
}


def lora(kind):
    peft = pytest.importorskip("peft")
    targets = {"mamba": ["x_proj", "in_proj"], "mamba2": ["in_proj"]}
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets[kind], task_type="CAUSAL_LM")


def check(trainer):
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    assert [record["step"] for record in history(base)] == CUTS
    assert sum(state_sizes(base)) <= 4 * len(state_sizes(base))
    logs = trainer.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == STEPS and torch.tensor(losses).isfinite().all()
    cuts = [entry for entry in logs if "compression/loss_after" in entry]
    assert len(cuts) == len(CUTS) and not any("mean_token_accuracy" in entry for entry in cuts)
    assert not trainer._metrics["eval"]  # what is measured around a cut is none of an evaluation's
    with torch.no_grad():
        assert base.eval()(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


def callback():
    return CompreSSMCallback(policy="target", target_state_size=4, cut_steps=CUTS, refit_steps=3)


@pytest.mark.parametrize(
    "kind, table, mode",
    [
        *(("mamba", OWN, mode) for mode in SFT),
        *(("mamba", STOCK, mode) for mode in ("plain", "packed")),
        *(("mamba2", OWN, mode) for mode in ("plain", "completion-only")),
        ("mamba2", STOCK, "completion-only"),
    ],
)
def test_supervised_fine_tuning(kind, table, mode, tmp_path):
    data, options = SFT[mode]
    args = trl.SFTConfig(str(tmp_path), **(COMMON | options))
    trainer = trl.SFTTrainer(
        make(table, kind).train(), args, train_dataset=DATA[data](), processing_class=tokenizer(),
        callbacks=[callback()],
    )  # fmt: skip
    trainer.train()
    check(trainer)


@pytest.mark.parametrize("kind, mode", [("mamba", "packed"), ("mamba2", "plain")])
def test_supervised_fine_tuning_of_adapters(kind, mode, tmp_path):
    data, options = SFT[mode]
    trainer = trl.SFTTrainer(
        make(STOCK, kind).train(), trl.SFTConfig(str(tmp_path), **(COMMON | options)), train_dataset=DATA[data](),
        processing_class=tokenizer(), peft_config=lora(kind), callbacks=[callback()],
    )  # fmt: skip
    trainer.train()
    check(trainer)


@pytest.mark.parametrize(
    "table, adapters", [(OWN, False), (OWN, True), (STOCK, False)], ids=["own", "own with lora", "stock"]
)
def test_preferences(table, adapters, tmp_path):
    make(table, "mamba").save_pretrained(tmp_path / "base")  # the reference is loaded anew
    args = trl.DPOConfig(str(tmp_path), model_init_kwargs={"dtype": "float32"}, **COMMON)
    trainer = trl.DPOTrainer(
        str(tmp_path / "base"), args=args, train_dataset=DATA["preference"](), processing_class=tokenizer(),
        peft_config=lora("mamba") if adapters else None, callbacks=[callback()],
    )  # fmt: skip
    reference = None if trainer.ref_model is None else [p.clone() for p in trainer.ref_model.parameters()]
    trainer.train()
    check(trainer)
    if reference is not None:
        assert all(map(torch.equal, reference, trainer.ref_model.parameters()))
