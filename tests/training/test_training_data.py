"""Data of every kind: what calibration reads of it, and that training misses none of it."""

import itertools

import datasets
import pytest
import torch
from helpers import arguments, small_model
from selective_models import OWN, make
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import Trainer

from hf_compressm import CompreSSMCallback, state_sizes
from hf_compressm.baselines import RivalCutCallback
from hf_compressm.surgery import history
from hf_compressm.training.calibration import TrainingData, calibration_batches

LENGTH, ROWS, STEPS = 12, 4, 10


def item(index):
    """A row that tells which it is by its first two tokens."""
    ids = torch.tensor([1 + index % 40, 1 + index // 40, *range(3, LENGTH + 1)])
    return {"input_ids": ids, "labels": ids.clone()}


def collate(items):
    return {name: torch.stack([one[name] for one in items]) for name in items[0]}


class Items(Dataset):
    def __init__(self, count=200):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return collate([item(i) for i in index]) if isinstance(index, list) else item(index)


class Itself(IterableDataset):
    """`iter()` gives the data set itself, which goes on where it was."""

    def __init__(self):
        self.counter = itertools.count()

    def __iter__(self):
        return self

    def __next__(self):
        return item(next(self.counter))


class OneGenerator(Itself):
    def __init__(self):
        self.generator = (item(i) for i in itertools.count())

    def __iter__(self):
        return self.generator


class SharedSource(Itself):
    """Each `iter()` is a new generator, but all read from one source, as from an open file."""

    def __iter__(self):
        for index in self.counter:
            yield item(index)


class Queue(Dataset):
    """Has indices, but gives the next item whatever the index, and no length."""

    def __init__(self):
        self.counter = itertools.count()

    def __getitem__(self, index):
        return item(next(self.counter))


class Loader:
    """Not a DataLoader at all."""

    def __init__(self):
        self.counter = itertools.count()

    def __iter__(self):
        while True:
            yield collate([item(next(self.counter)) for _ in range(ROWS)])


class Changed(DataLoader):
    """Makes other batches than its data set and collator do."""

    def __iter__(self):
        for batch in super().__iter__():
            yield {name: value + 0 for name, value in batch.items()} | {"marked": torch.ones(1)}


class Sizeless:
    """A batch sampler without batch_size, of batches that differ in size."""

    def __iter__(self):
        start = 0
        for size in itertools.cycle((2, 5, 3)):
            yield list(range(start, start + size))
            start = (start + size) % 190

    def __len__(self):
        return 60


def trainer_of(folder, callback, loader=None, dataset=None, model=None, **settings):
    class Own(Trainer):
        def get_train_dataloader(self):
            return super().get_train_dataloader() if loader is None else loader

    args = arguments(folder, max_steps=STEPS, per_device_train_batch_size=ROWS, **settings)
    model = make(OWN, "mamba").train() if model is None else model
    return Own(model, args, train_dataset=dataset, callbacks=[callback] if callback else [])


def trained_rows(trainer):
    """Rows that were trained on, in order, by what the data say of themselves."""
    seen = []

    def see(module, args, kwargs):
        if module.training:
            seen.extend(map(tuple, kwargs["input_ids"][:, :2].tolist()))

    handle = trainer.model.register_forward_pre_hook(see, with_kwargs=True)
    trainer.train()
    handle.remove()
    return seen


def cutting():
    return CompreSSMCallback(policy="target", target_state_size=3, cut_steps=[1, 4], refit_steps=2)


STREAMS = {
    "itself": lambda: {"dataset": Itself()},
    "one generator": lambda: {"dataset": OneGenerator()},
    "shared source": lambda: {"dataset": SharedSource()},
    "datasets": lambda: {"dataset": datasets.IterableDataset.from_generator(lambda: map(item, range(200)))},
    "datasets over a source": lambda: {"dataset": datasets.IterableDataset.from_generator(Itself().__iter__)},
    "no length": lambda: {"loader": DataLoader(Queue(), ROWS, sampler=range(400), collate_fn=collate)},
    "no loader": lambda: {"loader": Loader()},
    "a loader of its own kind": lambda: {"loader": Changed(Items(), ROWS, collate_fn=collate)},
    "sizeless": lambda: {"loader": DataLoader(Items(), batch_sampler=Sizeless(), collate_fn=collate)},
    "workers": lambda: {"loader": DataLoader(SharedSource(), ROWS, collate_fn=collate, num_workers=1)},
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("callback", [cutting, lambda: RivalCutCallback("ghost", 3, [1, 4])], ids=["own", "rival"])
def test_training_reads_what_it_would_without_cuts(kind, callback, tmp_path):
    plain = trained_rows(trainer_of(tmp_path, None, **STREAMS[kind]()))
    trainer = trainer_of(tmp_path, callback(), **STREAMS[kind]())
    assert trained_rows(trainer) == plain and len(set(plain)) == len(plain) > STEPS
    assert sum(state_sizes(trainer.model)) <= 9 and len(history(trainer.model)) == 2
    assert any("compression/loss_after" in entry for entry in trainer.state.log_history)
    assert "training_step" not in vars(trainer)


def test_layers_without_data_leave_streams_alone_too(tmp_path):
    class Stream(Itself):
        def __next__(self):
            return {"input_values": torch.full((6, 1), float(next(self.counter))), "labels": torch.tensor(0)}

    seen = []
    model = small_model()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_values"][:, 0, 0].tolist()) if module.training else None,
        with_kwargs=True,
    )
    trainer = trainer_of(tmp_path, CompreSSMCallback(cut_steps=[2, 5]), dataset=Stream(), model=model)
    trainer.train()
    assert seen == list(range(STEPS * ROWS)) and history(model)
    assert any("compression/loss_before" in entry for entry in trainer.state.log_history)


def test_a_second_training_of_the_same_trainer_keeps_its_own(tmp_path):
    callback = CompreSSMCallback(policy="fraction", keep_fraction=0.5, cut_steps=[3])
    trainer = trainer_of(tmp_path, callback, dataset=Itself())
    seen = trained_rows(trainer) + trained_rows(trainer)
    assert len(set(seen)) == len(seen) and "training_step" not in vars(trainer)


def test_an_error_in_training_leaves_nothing_that_matters(tmp_path):
    trainer = trainer_of(tmp_path, cutting(), dataset=Itself())
    broken = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: 1 / 0 if module.training else None, with_kwargs=True
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    broken.remove()
    trainer.train()
    assert sum(state_sizes(trainer.model)) <= 9


def test_reading_by_hand_refuses_a_shared_iterator():
    for dataset in (Itself(), OneGenerator()):
        with pytest.raises(ValueError, match="gives the same iterator each time.*Let iter"):
            calibration_batches(DataLoader(dataset, ROWS, collate_fn=collate), 2, 0)
        assert next(iter(dataset))["input_ids"][0] == 1
    fresh = datasets.IterableDataset.from_generator(lambda: map(item, range(20))).with_format("torch")
    found = calibration_batches(DataLoader(fresh, ROWS, collate_fn=collate), 2, 0)
    assert [len(batch["input_ids"]) for batch in found] == [ROWS, ROWS]


class Lists(BatchSampler):
    pass


LOADERS = {
    "batch_size": lambda: DataLoader(Items(), ROWS, collate_fn=collate),
    "batch_sampler": lambda: DataLoader(
        Items(), batch_sampler=BatchSampler(SequentialSampler(Items()), ROWS, False), collate_fn=collate
    ),
    "subclass of BatchSampler": lambda: DataLoader(
        Items(), batch_sampler=Lists(SequentialSampler(Items()), ROWS, True), collate_fn=collate
    ),
    "lists of indices": lambda: DataLoader(
        Items(), sampler=BatchSampler(SequentialSampler(Items()), ROWS, False), batch_size=None
    ),
    "items are batches": lambda: DataLoader([collate([item(i)] * ROWS) for i in range(50)], batch_size=None),
    "subclass": lambda: type("Subclass", (DataLoader,), {})(Items(), ROWS, collate_fn=collate),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", LOADERS)
def test_every_way_to_say_the_size_of_a_batch(kind, prepared):
    from accelerate import Accelerator

    if prepared and kind == "lists of indices":
        pytest.skip("accelerate cannot prepare such a loader")
    loader = LOADERS[kind]()
    loader = Accelerator(cpu=True).prepare(loader) if prepared else loader
    data = TrainingData(loader, 3)
    assert data.drawn
    for found in (data.batches(5), calibration_batches(loader, 3, 5)):
        assert [batch["input_ids"].shape for batch in found] == [(ROWS, LENGTH)] * 3
    if kind != "items are batches":
        rows = [tuple(row[:2].tolist()) for batch in found for row in batch["input_ids"]]
        assert len(set(rows)) == 3 * ROWS  # one process, no row twice
    parts = [TrainingData(loader, 3, rank, 2).batches(5) for rank in range(2)]
    whole = TrainingData(loader, 6).batches(5)
    together = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert [batch["input_ids"].tolist() for batch in together] == [batch["input_ids"].tolist() for batch in whole]


@pytest.mark.parametrize("loader", ["no loader", "a loader of its own kind", "sizeless", "no length"])
def test_other_loaders_are_not_drawn_from(loader):
    assert not TrainingData(STREAMS[loader]()["loader"], 2).drawn


def test_a_batch_sampler_that_tells_no_size_is_refused_by_hand():
    with pytest.raises(ValueError, match=r"batch sampler \(Sizeless\) does not tell the size.*attribute batch_size"):
        calibration_batches(STREAMS["sizeless"]()["loader"], 2, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator_config": {"dispatch_batches": True}},
        {"accelerator_config": {"split_batches": True}},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_settings_of_the_trainers_own_loader(settings, tmp_path):
    def data():
        return datasets.Dataset.from_list([{k: v.tolist() for k, v in item(i).items()} for i in range(200)])

    plain = trained_rows(trainer_of(tmp_path, None, dataset=data(), **settings))
    trainer = trainer_of(tmp_path, cutting(), dataset=data(), **settings)
    assert trained_rows(trainer) == plain and sum(state_sizes(trainer.model)) <= 9
    assert {len(batch["input_ids"]) for batch in calibration_batches(trainer.get_train_dataloader(), 3, 0)} == {ROWS}


class Weighted(Trainer):
    """Pops a field that forward does not know."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = inputs.pop("weights")
        return (model(**inputs).loss * weights).mean()


class Pairs(Trainer):
    """Contrasts two sequences, neither of which has the name that forward knows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        left, right = (model(input_ids=inputs[name]).logits.mean(1) for name in ("left", "right"))
        return (left - right).square().mean()


def listed(*names):
    return datasets.Dataset.from_list([dict.fromkeys(names, item(i)["input_ids"].tolist()) for i in range(60)])


@pytest.mark.parametrize(
    "cls, fields",
    [
        (Trainer, ("input_ids", "labels", "position_ids", "token_type_ids")),
        (Weighted, ("input_ids", "labels", "weights")),
        (Pairs, ("left", "right")),
    ],
)
def test_what_the_trainer_can_train_on_can_be_ranked_on(cls, fields, tmp_path):
    def weigh(items):
        batch = {name: torch.tensor([one[name] for one in items]) for name in items[0]}
        return batch | ({"weights": torch.ones(len(items), 1)} if "weights" in batch else {})

    model = make(OWN, "mamba").train()
    args = arguments(tmp_path, max_steps=6, remove_unused_columns=False)
    cls(model, args, train_dataset=listed(*fields), data_collator=weigh, callbacks=[cutting()]).train()
    assert sum(state_sizes(model)) <= 9 and all(record["step"] in (1, 4) for record in history(model))


def fails(folder, match, loader, error=ValueError, **settings):
    """Training fails with a sentence before it has taken a step."""
    trainer = trainer_of(folder, CompreSSMCallback(cut_steps=[6], **settings), loader)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_what_cannot_work_is_found_before_the_first_step(tmp_path):
    short = DataLoader([{"input_ids": torch.tensor([3]), "labels": torch.tensor([3])}] * 40, ROWS)
    fails(tmp_path, "1 training batches hold 4 real tokens.*8 states. Raise calibration", short, calibration_batches=1)

    class NotNamed(Loader):
        def __iter__(self):
            yield [torch.ones(2, 5, dtype=torch.long)]

    fails(tmp_path, "must be a mapping from names to tensors; got list", NotNamed(), TypeError)

    class Broken(Loader):
        def __iter__(self):
            yield {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 3)}

    fails(tmp_path, "attention_mask must have shape", Broken(), (ValueError, RuntimeError))
