"""A family that nobody supports, whose layers differ from LLaMA's by what the config says."""

import transformers
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaModel, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention


class MadeUpConfig(transformers.LlamaConfig):
    model_type = "made_up"
    use_qk_norm: bool = False
    norms_over_heads: bool = False
    norms_after: bool = False
    residual_scale: float | None = None
    layer_norm_eps: float = 1e-6


class MadeUpLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = (Olmo2Attention if config.norms_over_heads else CohereAttention)(config, layer_idx)
        self.feed = LlamaMLP(config)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(4)
        )
        self.norms_after, self.scale = config.norms_after, config.residual_scale

    def forward(self, hidden_states, **kwargs):
        output, _ = self.attn(self.norm_1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.joined(output, self.norm_2)
        return hidden_states + self.joined(self.feed(self.norm_3(hidden_states)), self.norm_4)

    def joined(self, output, norm):
        output = norm(output) if self.norms_after else output
        return output if self.scale is None else self.scale * output


class MadeUpModel(LlamaModel):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        for index in range(len(self.layers)):
            self.layers[index] = MadeUpLayer(config, index)
        self.post_init()


class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MadeUpModel(config)
        self.post_init()


def register():
    transformers.AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    transformers.AutoModel.register(MadeUpConfig, MadeUpModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
