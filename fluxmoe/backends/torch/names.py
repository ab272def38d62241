"""The names from ``transformers`` that the torch backend uses, grouped by importing module."""

from __future__ import annotations

from fluxmoe.backends.names import Names

_MOE = "transformers.integrations.moe:"
_COMPUTE = "hidden_states top_k_index top_k_weights"

NAMES = Names(
    "transformers",
    "install transformers >= 5",
    {
        "experts": {
            _MOE + "ALL_EXPERTS_FUNCTIONS.register": "key value",
            _MOE + "batched_mm_experts_forward": _COMPUTE,
            _MOE + "grouped_mm_experts_forward": _COMPUTE,
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
        "sampling": {
            "transformers:StoppingCriteria": "",
            "transformers:StoppingCriteriaList": "",
        },
    },
    {},
)
