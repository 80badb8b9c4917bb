from ..models import pruned_qwen2
from .llama import LLAMA_ATTENTION, LLAMA_MLP
from .registry import Architecture, register_architecture


register_architecture(Architecture.from_module("qwen2", LLAMA_ATTENTION, LLAMA_MLP, pruned_qwen2))
