"""LDMBertModel of diffusers <-> our text transformer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.settings import ConditionSettings
from ldmcli.formats.diffusers_files import MOST_LAYERS, Config, Names, read_weights, translate, translate_back
from ldmcli.networks.text_encoder import TextTransformer

BERT = "LDMBertModel"
DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "activation_function": "gelu",
    "d_model": 1280,
    "scale_embedding": False,
}


def text_names(layers: int) -> Names:
    """Where the parts of our text transformer stand in theirs."""
    names = Names(
        {
            "transformer.token_emb": "model.embed_tokens",
            "transformer.pos_emb.emb": "model.embed_positions",
            "transformer.norm": "model.layer_norm",
            "transformer.to_logits": "to_logits",
        }
    )
    for layer in range(layers):
        ours, theirs = "transformer.attn_layers.layers", f"model.layers.{layer}"
        names.roots |= {
            f"{ours}.{2 * layer}.0": f"{theirs}.self_attn_layer_norm",
            **{f"{ours}.{2 * layer}.1.to_{part}": f"{theirs}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
            f"{ours}.{2 * layer + 1}.0": f"{theirs}.final_layer_norm",
            f"{ours}.{2 * layer + 1}.1.net.0.0": f"{theirs}.fc1",
            f"{ours}.{2 * layer + 1}.1.net.2": f"{theirs}.fc2",
        }
    return names


def read_text(folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(condition settings, spec, tensors of the encoder) of a text encoder's folder. Raises ModelError."""
    config = Config(folder / "config.json", values, DEFAULTS)
    config.only(activation_function=("gelu",), scale_embedding=(False,))
    width, layers = config.integer("d_model"), config.integer("encoder_layers", MOST_LAYERS)
    if config.integer("encoder_ffn_dim") != 4 * width:
        raise config.refuse("encoder_ffn_dim", f"four times d_model = {width} is expected")
    heads, head = config.integer("encoder_attention_heads"), config.integer("head_dim")
    length, vocabulary = config.integer("max_position_embeddings"), config.integer("vocab_size")
    weights = read_weights(folder, "model")
    head_names = [name for name in ("to_logits.weight", "to_logits.bias") if name in weights]
    logits = any(bool(weights[name].any()) for name in head_names)
    for name in () if logits else head_names:  # the output layer, which nothing reads
        del weights[name]
    with torch.device("meta"):
        ours = TextTransformer(vocabulary, width, layers, length, heads, head, logits).state_dict()
    tensors = translate(text_names(layers), weights, ours, folder)
    settings = {
        "context_dim": width,
        "text_layers": layers,
        "text_heads": heads,
        "text_head_channels": head,
        "text_length": length,
        "text_encoder": "joint",
        "text_pooled": False,
        "embedding_std": 0.02,
    }
    return settings, {"length": length, "vocabulary": vocabulary} | ({"logits": True} if logits else {}), tensors


def write_text(
    condition: ConditionSettings, spec: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors) of an LDMBertModel; its output layer, which nothing reads, may be zeros."""
    width, layers, vocabulary = condition.context_dim, condition.text_layers, spec["vocabulary"]
    config = {
        "_name_or_path": "",
        "architectures": [BERT],
        "model_type": "ldmbert",
        "activation_function": "gelu",
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "classifier_dropout": 0.0,
        "d_model": width,
        "encoder_ffn_dim": 4 * width,
        "encoder_layers": layers,
        "encoder_attention_heads": condition.text_heads,
        "head_dim": condition.text_head_channels,
        "init_std": 0.02,
        "max_position_embeddings": spec["length"],
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "scale_embedding": False,
        "use_cache": True,
        "vocab_size": vocabulary,
        "dtype": "float32",
    }
    unused = {"to_logits.weight": torch.zeros(vocabulary, width), "to_logits.bias": torch.zeros(vocabulary)}
    return config, unused | translate_back(text_names(layers), tensors)
