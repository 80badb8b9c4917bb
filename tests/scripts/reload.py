"""Load every checkpoint of a folder in this process and write what they compute beside them.

    python reload.py FOLDER plugin|remote

`plugin` imports optimum_fwdprune; `remote`, where it is not installed, trusts the checkpoints' own code.
"""

import importlib.util
import json
import sys
from pathlib import Path


folder, route = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(Path(__file__).parents[1]))

if route == "remote":
    assert importlib.util.find_spec("optimum_fwdprune") is None
else:
    from third_party_persimmon import register_persimmon

    import optimum_fwdprune  # noqa: F401

    register_persimmon()

# After the lines above have decided who may be imported.
import transformers  # noqa: E402
from computed import outputs_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def compute(checkpoint):
    request = json.loads((checkpoint / "request.json").read_text())
    auto_class = getattr(transformers, request["auto_class"])
    tokens = load_file(checkpoint / "inputs.safetensors")["tokens"]
    outputs = {}
    for implementation in request["attention"]:
        model = auto_class.from_pretrained(
            checkpoint,
            dtype="auto",
            attn_implementation=implementation,
            trust_remote_code=route == "remote",
        ).eval()
        assert type(model).__name__.startswith("Pruned"), type(model)
        assert ("transformers_modules" in type(model).__module__) == (route == "remote")
        outputs |= outputs_of(model, tokens, [implementation], request["caches"])
    save_file(outputs, checkpoint / "outputs.safetensors")


for checkpoint in sorted(folder.iterdir()):
    if (checkpoint / "request.json").is_file():
        compute(checkpoint)
