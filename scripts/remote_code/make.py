"""Write the modelling code that saved models carry, from the modules of the package.

    python scripts/remote_code/make.py          # write it to hf_compressm/models/remote
    python scripts/remote_code/make.py --check  # write nothing; exit with 1 if files there are not up to date

For each model the folder has a configuration and a modelling file, and there is one for the feature extractor. They
hold plain PyTorch that needs torch and transformers only, with numpy, which transformers needs: in place of the
package's ops they have the functions of `hf_compressm/models/torch_ops.py`. Their names end with .txt, so that nothing
takes them for modules of the package; saved models get them without that ending.
"""

from __future__ import annotations

import argparse
import re
import sys

from bundle import PACKAGE, ROOT, Bundle

FOLDER = ROOT / PACKAGE / "models/remote"
COMMAND = "python scripts/remote_code/make.py"
NAMES = {
    "compressm_gated_deltanet": "CompreSSMGatedDeltaNet",
    "compressm_mamba": "CompreSSMMamba",
    "compressm_mamba2": "CompreSSMMamba2",
    "compressm_minimax": "CompreSSMMiniMax",
    "mimo_ssm": "MimoSSM",
}
OPS = ("causal_conv", "diag_system", "gated_delta_scan", "selective_scan", "ssd_scan")
"""Functions of `models/torch_ops.py`, each with the name of the op that it replaces."""
TORCH_OPS = f"{PACKAGE}.models.torch_ops"
REPLACEMENTS = {(f"{PACKAGE}.ops.{name}", name): (TORCH_OPS, name) for name in OPS}
REPLACEMENTS[(f"{PACKAGE}.ops.gated_delta_scan", "gated_delta_step")] = (TORCH_OPS, "gated_delta_step")
REPLACEMENTS[(f"{PACKAGE}.models.remote_code", "CarriesCode")] = (TORCH_OPS, "CarriesCode")
REPLACEMENTS[(f"{PACKAGE}.models.carried_code", "CarriesExtractorCode")] = (TORCH_OPS, "CarriesExtractorCode")
EXTRACTOR = "feature_extraction_mimo_ssm.py.txt"

TITLE = """{what} of {name}.

Written by {package} {version} from its own sources: plain PyTorch that needs torch and transformers only. Where the
package is installed, models load with its faster classes instead. License: Apache-2.0.
"""


def made() -> dict[str, str]:
    """Return the files of the folder, by name, as the present sources give them."""
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert found, "pyproject.toml names no version"
    extractor = TITLE.format(
        what="Feature extractor", name="models of numeric sequences", package=PACKAGE, version=found[1]
    )
    texts = {EXTRACTOR: Bundle(REPLACEMENTS).write(f"{PACKAGE}.models.feature_extractor", extractor)}
    for model, name in NAMES.items():
        configuration, modelling = (
            f"{PACKAGE}.models.{model}.{kind}_{model}" for kind in ("configuration", "modeling")
        )
        for module, what in ((configuration, "Configuration"), (modelling, "Models")):
            title = TITLE.format(what=what, name=name, package=PACKAGE, version=found[1])
            bundle = Bundle(REPLACEMENTS, frozenset({configuration} - {module}))
            texts[f"{module.rpartition('.')[2]}.py.txt"] = bundle.write(module, title)
    return texts


def stale() -> list[str]:
    """List the names of files that are missing in the folder, are not up to date, or should not be there."""
    texts = made()
    present = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir()} if FOLDER.exists() else {}
    return sorted(name for name in texts.keys() | present.keys() if texts.get(name) != present.get(name))


def main() -> None:
    """Write the files, or with --check compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    names = stale()
    if parser.parse_args().check:
        sys.exit(f"not up to date: {', '.join(names)}; run {COMMAND}" if names else 0)
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for name, text in made().items():
        (FOLDER / name).write_text(text, "utf-8")
    print(f"updated: {', '.join(names) or 'nothing'}")


if __name__ == "__main__":
    main()
