"""The names from ``transformers`` that the torch backend uses, grouped by importing module."""

from __future__ import annotations

from fluxmoe.backends.names import Names

_MOE = "transformers.integrations.moe:"
_LOADING = "transformers.core_model_loading:"
_CONVERT = "layer_name model config hf_quantizer loading_info"
_COMPUTE = "hidden_states top_k_index top_k_weights"

NAMES = Names(
    "transformers",
    "install transformers >= 5",
    {
        "experts": {
            _MOE + "ALL_EXPERTS_FUNCTIONS.register": "key value",
            "transformers:PretrainedConfig._experts_implementation": "",
            "transformers:PreTrainedModel.base_model": "",
            "transformers:PreTrainedModel.get_experts_implementation": "",
            "transformers:PreTrainedModel.set_experts_implementation": "experts_implementation",
        },
        "loader": {
            "transformers:AutoConfig.from_pretrained": "",
            "transformers:AutoModelForCausalLM.from_config": "",
            "transformers:AutoModelForCausalLM.from_pretrained": "",
        },
        "loading": {
            _LOADING + "Concatenate": "dim",
            _LOADING + "MergeModulelist": "dim",
            _LOADING + "WeightConverter.convert": _CONVERT,
            _LOADING + "WeightRenaming.convert": _CONVERT,
            _LOADING + "_materialize_copy": "tensor device dtype",
            _LOADING + "spawn_materialize": "thread_pool tensor device dtype",
        },
        "twin": {
            _MOE + "ALL_EXPERTS_FUNCTIONS.get": "",
            _MOE + "_batched_linear": "",
            _MOE + "_grouped_linear": "",
            _MOE + "batched_mm_experts_forward": _COMPUTE,
            _MOE + "grouped_mm_experts_forward": _COMPUTE,
            "transformers.activations:ACT2CLS": "",
        },
        "sampling": {
            "transformers:StoppingCriteria": "",
            "transformers:StoppingCriteriaList": "",
        },
    },
    {},
)
