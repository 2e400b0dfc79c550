"""Ways to spoil a checkpoint's files, for test_malformed.py: each takes a path, and a folder for its code to make."""

import copy
import json
import os
import pickle

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_compressm.training.checkpoints.contents import load_callback_state, save_callback_state


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def remove(path, marker):
    path.unlink()


def empty(path, marker):
    path.write_bytes(b"")


def truncate(path, marker):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(content):
    return lambda path, marker: path.write_bytes(content)


def edit(change):
    """Change the JSON in a file, in place or by a mapping that the change returns."""

    def spoil(path, marker):
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(changed if isinstance(changed, dict) else content))

    return spoil


def put(**values):
    return edit(lambda content: content | values)


def drop(key):
    return edit(lambda content: {k: v for k, v in content.items() if k != key})


def saved(change):
    """Change what the compression callback exported to the Trainer's state."""

    def in_place(content):
        change(content["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["saved"])

    return edit(in_place)


def raw_pickle(path, marker):
    path.write_bytes(pickle.dumps(Payload(marker)))


def torch_pickle(path, marker):
    torch.save({"state": {}, "param_groups": [Payload(marker)], "last_epoch": 1}, path)


def pickled_weights(path, marker):
    path.unlink()
    torch.save({"weight": Payload(marker)}, path.parent / "pytorch_model.bin")


def foreign_code(path, marker):
    (path.parent / "configuration_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "configuration_evil.Evil"}
    put(model_type="evil", auto_map=auto)(path, marker)


def tensors(change):
    """Change the tensors of a safetensors file."""

    def spoil(path, marker):
        content = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(change(content), path, metadata=metadata)

    return spoil


def callback_tree(change):
    """Change the tree in the compression callback's own file."""

    def spoil(path, marker):
        tree = copy.deepcopy(load_callback_state([path.parent]))
        change(tree)
        save_callback_state(path.parent, tree)

    return spoil


def torch_content(change):
    """Change what torch.save wrote."""

    def spoil(path, marker):
        content = torch.load(path, weights_only=path.suffix == ".pt")  # the test's own file, with numpy's state
        torch.save(change(content), path)

    return spoil


def wider_moments(content):
    for state in content["state"].values():
        state["exp_avg"] = torch.zeros(2, *state["exp_avg"].shape)
    return content
