from ..models import pruned_mistral
from .llama import LLAMA_ATTENTION, LLAMA_MLP
from .registry import Architecture, register_architecture


register_architecture(Architecture.from_module("mistral", LLAMA_ATTENTION, LLAMA_MLP, pruned_mistral))
