"""Load every checkpoint of a folder with tensor parallelism over the processes, and write what it computes beside it.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 python split_over_devices.py FOLDER & RANK=1 LOCAL_RANK=1 ...
"""

import os
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import optimum_fwdprune  # noqa: F401


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@torch.no_grad()
def compute(checkpoint, rank):
    tokens = load_file(checkpoint.parent / "inputs.safetensors")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=DistributedConfig(tp_plan="auto"))
    split = {name: parameter for name, parameter in model.named_parameters() if hasattr(parameter, "to_local")}
    own = {name: parameter.to_local() for name, parameter in split.items()}
    generated = model.generate(tokens[:1, :6], max_new_tokens=6, do_sample=False, pad_token_id=0)
    outputs = {"logits": model(tokens).logits, "generated": generated}
    for file, values in {"outputs": outputs, "weights": own}.items():
        save_file({name: value.contiguous() for name, value in values.items()}, checkpoint / f"{file}-{rank}")


# A file in the place of a port, which another test may take.
torch.distributed.init_process_group(
    "gloo",
    init_method=f"file://{Path(sys.argv[1]).resolve()}/meeting",
    rank=int(os.environ["RANK"]),
    world_size=int(os.environ["WORLD_SIZE"]),
)
for checkpoint in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    try:
        compute(checkpoint, os.environ["RANK"])
    except Exception as error:
        # All processes fail in the same place, and go on with the next one.
        (checkpoint / f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
torch.distributed.destroy_process_group()
