"""The model's hyper-parameters, and their translation from and to Qwen3's config.json."""

from transformers import PreTrainedConfig


class CustomLLMConfig(PreTrainedConfig):
    """Hyper-parameters: in memory under the names below or Hugging Face's, on disk under Qwen3's.

    Raises:
        ValueError: sizes do not fit together. One message lists them all.
    """

    model_type = "custom_llm"  # on disk: qwen3 or qwen3_moe, see to_dict
    attribute_map = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "moe_d_ff": "moe_intermediate_size",
    }

    def __init__(
        self,
        vocab_size: int = 6400,
        d_model: int = 512,
        n_heads: int = 8,
        n_kv_heads: int | None = None,  # None: one key/value head per query head
        n_layers: int = 6,
        d_ff: int = 2048,
        max_seq_len: int = 512,
        use_moe: bool = False,
        num_experts: int = 4,
        top_k: int = 2,  # experts per token
        moe_d_ff: int | None = None,  # width of one expert; None: d_ff
        dropout: float = 0.0,
        rope_theta: float = 1e4,
        tie_word_embeddings: bool = True,
        head_dim: int | None = None,  # None: d_model / n_heads
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        router_aux_loss_coef: float = 0.01,  # Switch Transformer's (arXiv 2101.03961, section 2.2)
        **kwargs,
    ):
        self.vocab_size, self.d_model, self.n_layers, self.d_ff = (
            vocab_size,
            d_model,
            n_layers,
            d_ff,
        )
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.head_dim = d_model // max(n_heads, 1) if head_dim is None else head_dim
        self.max_seq_len = max_seq_len
        self.use_moe, self.num_experts = use_moe, num_experts
        # Not as `top_k`: transformers reads that name of a config as the sampling parameter.
        self.num_experts_per_tok = top_k
        self.moe_d_ff = d_ff if moe_d_ff is None else moe_d_ff
        self.dropout, self.rope_theta = dropout, float(rope_theta)
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.router_aux_loss_coef = router_aux_loss_coef
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = kwargs.pop("use_cache", True)
        self._check_sizes(derived_head_dim=head_dim is None)
        # Set here, because some releases of transformers read them from the config and some do not.
        self.pad_token_id = kwargs.pop("pad_token_id", None)
        self.bos_token_id = kwargs.pop("bos_token_id", None)
        self.eos_token_id = kwargs.pop("eos_token_id", None)
        super().__init__(**kwargs)

    def _check_sizes(self, derived_head_dim: bool):
        sizes = ["vocab_size", "d_model", "n_heads", "n_kv_heads", "n_layers", "d_ff"]
        sizes += ["max_seq_len", "moe_d_ff"] if self.use_moe else ["max_seq_len"]
        sizes += [] if derived_head_dim else ["head_dim"]
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in sizes
            if getattr(self, name) < 1
        ]
        if not problems:
            if derived_head_dim and self.d_model % self.n_heads:
                problems.append(
                    f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}"
                )
            elif self.head_dim % 8 or self.head_dim > 256:
                problems.append(
                    f"head_dim={self.head_dim} (d_model / n_heads) must be a multiple of 8 and at "
                    "most 256, or a GPU's attention kernels refuse it"
                )
            if self.n_heads % self.n_kv_heads:
                problems.append(
                    f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}"
                )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            problems.append(
                f"top_k={self.num_experts_per_tok} must be in 1..num_experts={self.num_experts}"
            )
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout={self.dropout} must be in [0, 1)")
        if problems:
            raise ValueError("Impossible model configuration: " + "; ".join(problems) + ".")

    def to_dict(self) -> dict:
        """The dictionary that becomes config.json: a Qwen3 or Qwen3-MoE configuration.

        Values whose spelling changed between transformers 4 and 5 are written both ways.
        """
        config = super().to_dict()
        config["model_type"] = "qwen3_moe" if self.use_moe else "qwen3"
        config["architectures"] = ["Qwen3MoeForCausalLM" if self.use_moe else "Qwen3ForCausalLM"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        config |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": self.dropout}
        config |= {"use_sliding_window": False, "sliding_window": None}
        if self.use_moe:
            config |= {"num_local_experts": self.num_experts, "norm_topk_prob": True}
            config |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
        else:
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                config.pop(name, None)
        return config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a Qwen3 or Qwen3-MoE config.json as keyword arguments of this class."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config:
            raise OSError(f"{pretrained_model_name_or_path} holds no config.json.")
        return cls._from_qwen3(config, str(pretrained_model_name_or_path)), kwargs

    @classmethod
    def _from_qwen3(cls, config: dict, source: str) -> dict:
        model_type = config.pop("model_type", None)
        config["use_moe"] = model_type == "qwen3_moe"
        ropes = {name: config.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling")}
        unsupported = {
            "model_type": model_type not in ("qwen3", "qwen3_moe"),
            "hidden_act": config.pop("hidden_act", "silu") != "silu",
            "attention_bias": config.pop("attention_bias", False),
            "use_sliding_window": config.pop("use_sliding_window", False),
            "mlp_only_layers": bool(config.pop("mlp_only_layers", None)),
            "decoder_sparse_step": config.pop("decoder_sparse_step", 1) != 1,
            "norm_topk_prob": config["use_moe"] and not config.pop("norm_topk_prob", False),
        }
        for name, rope in ropes.items():
            kind = rope.get("rope_type") or rope.get("type", "default")
            unsupported[name] = kind != "default"
        if any(unsupported.values()):
            names = ", ".join(name for name, bad in unsupported.items() if bad)
            raise ValueError(
                f"{source} is not a Qwen3 or Qwen3-MoE checkpoint that this model reproduces: "
                f"unsupported {names} in its config.json (model_type: {model_type})."
            )
        rope = ropes["rope_parameters"] or ropes["rope_scaling"]
        config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 1e4))
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts", 4))
        config["top_k"] = config.pop("num_experts_per_tok", 2)
        for name in ("architectures", "attention_dropout", "sliding_window", "layer_types"):
            config.pop(name, None)
        for ours, theirs in cls.attribute_map.items():
            if theirs in config:
                config[ours] = config.pop(theirs)
        return config
