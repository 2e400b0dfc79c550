"""What the tests run in fresh processes against the local hub: `python client.py COMMAND FOLDER ...` prints JSON."""

import contextlib
import io
import json
import os
import sys
import types
import urllib.request
from pathlib import Path

COMMAND, FOLDER = sys.argv[1], Path(sys.argv[2])
if COMMAND == "load-blocked":
    sys.modules["hf_compressm"] = None

import huggingface_hub  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from server import STAGES  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IDS = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(1))


def control(**settings):
    request = urllib.request.Request(f"{constants.ENDPOINT}/control", json.dumps(settings).encode(), method="POST")
    urllib.request.urlopen(request).close()


@torch.no_grad()
def outputs(model):
    tokens = model.generate(IDS[:, :5], max_new_tokens=12, do_sample=False)
    return model(IDS).logits, tokens


def spread(model):
    """Weights with which all states matter; initial values make them alike."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "A_log" not in name:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model


def make_models():
    from selective_models import own

    from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM

    torch.manual_seed(0)
    mimo = MimoSSMForCausalLM(MimoSSMConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_sizes=[5, 9]))
    return {"mamba": spread(own("mamba")), "mamba2": spread(own("mamba2")), "mimo": spread(mimo.eval())}


def command_line(*argv):
    """Exit code and what was printed by the console script, in this process."""
    from hf_compressm import cli

    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            cli.main(list(map(str, argv)))
        except SystemExit as stopped:
            return stopped.code or 0, printed.getvalue(), errors.getvalue()


def publish():
    """The models by the model's own method and by the command line, each way of sharing once."""
    models = make_models()
    for name, model in models.items():
        model.save_pretrained(FOLDER / name)
        torch.save(outputs(model), FOLDER / f"{name}.pt")
    (FOLDER / "mamba2/README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (FOLDER / "mamba2/training_args.bin").write_bytes(os.environ["HF_TOKEN"].encode())
    models["mamba"].push_to_hub("plain-mamba")
    stock = huggingface_hub.HfApi().create_repo("stock").repo_id
    for old in ("adapter_config.json", "model.safetensors.index.json", "notes.txt"):
        huggingface_hub.upload_file(path_or_fileobj=b"{}", path_in_repo=old, repo_id=stock)
    results = {
        name: command_line("push", FOLDER / source, name, *options, "--json")
        for name, source, options in (
            ("own-mamba2", "mamba2", ["--message", "First"]),
            ("private-mimo", "mimo", ["--private", "--revision", "trial"]),
            ("stock", "mamba", ["--to", "stock"]),
            ("someone-else/mimo", "mimo", []),
            ("plain-mamba", "mamba", ["--private"]),
        )
    }
    results["again"] = command_line("push", FOLDER / "mamba2", "own-mamba2", "--json")
    return results


def train():
    """A Trainer that pushes while it trains and at its end, as one push per checkpoint."""
    from helpers import arguments, small_data, small_model
    from transformers import Trainer

    from hf_compressm import CompreSSMCallback, state_sizes

    # The pipeline that is the default where hf_xet is installed; this hub has no Xet storage for large files.
    constants.HF_HUB_DISABLE_XET = False
    control(lfs=False)
    settings = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps", "hub_strategy": "every_save"}
    args = arguments(FOLDER / "trained", push_to_hub=True, hub_model_id="trained", **settings)
    model = small_model(state_sizes=24)
    callback = CompreSSMCallback(policy="fraction", keep_fraction=0.5, cut_steps=[3])
    trainer = Trainer(model, args, train_dataset=small_data(), callbacks=[callback])
    trainer.train()
    trainer.push_to_hub()
    control(lfs=True)
    constants.HF_HUB_DISABLE_XET = True
    torch.save(model.eval()(input_values=torch.ones(1, 6, 1)).logits, FOLDER / "trained.pt")
    return state_sizes(model)


def load(*names):
    """Class names, and deviations from the outputs in FILE, of models REPOSITORY[@REVISION]=FILE."""
    found = {}
    for name in names:
        repo, file = name.split("=")
        repo, _, revision = repo.partition("@")
        trust = True if "hf_compressm" in sys.modules and sys.modules["hf_compressm"] is None else None
        options = {"revision": revision or None, "trust_remote_code": trust}
        expected, tokens = torch.load(FOLDER / file)
        model = AutoModelForCausalLM.from_pretrained(repo, **options).eval()
        logits, generated = outputs(model)
        error = float((logits - expected).abs().max() / expected.abs().max())
        found[repo] = [f"{type(model).__module__}.{type(model).__name__}", error, torch.equal(generated, tokens)]
    return found


def interrupt(count):
    """Pushes that are cut: error, and what the repository held before, after the cut and after a rerun."""
    from selective_models import own

    from hf_compressm.hub import push

    http = huggingface_hub.utils._http
    http.time = types.SimpleNamespace(sleep=lambda _: None)  # between tries
    old = spread(own("mamba"))

    def held(repo, new, cache):
        try:
            model = AutoModelForCausalLM.from_pretrained(repo, cache_dir=FOLDER / cache).eval()
        except Exception as missing:
            # A repository without a config has no model type; anything else is no clear absence.
            return "absent" if isinstance(missing, OSError) or "Unrecognized model" in str(missing) else "wrong"
        same = (
            name for name, known in (("old", old), ("new", new)) if torch.equal(known(IDS).logits, model(IDS).logits)
        )
        return next(same, "wrong")

    found = []
    for seed in range(count):
        # Half of the new models have the old one's shapes and another config, so that a mixture would load.
        changed = {"layer_norm_epsilon": 0.5} if seed % 4 < 2 else {"state_sizes": [2, 4, 4]}
        new = spread(own("mamba", seed=seed + 1, **changed))
        repo, folder = f"someone/cut-{seed}", str(FOLDER / "versions" / str(seed))
        new.save_pretrained(folder)
        if seed >= len(STAGES):
            old.push_to_hub(repo, max_shard_size="40KB")
        before, error = held(repo, new, f"cache-{seed}-before"), ""
        control(fault=seed)
        try:
            push(folder, repo)
        except RuntimeError as stopped:
            error = str(stopped)
        control()
        after = held(repo, new, f"cache-{seed}-after")
        push(folder, repo)
        found.append([error, before, after, held(repo, new, f"cache-{seed}-rerun")])
    return found


if COMMAND == "load":
    import hf_compressm  # noqa: F401  registers its classes
runs = {"pushed": publish, "trained": train, "cut": lambda: interrupt(20)}
print(json.dumps({name: run() for name, run in runs.items()} if COMMAND == "share" else load(*sys.argv[3:])))
