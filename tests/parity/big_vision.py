"""Models of transformers as the arrays of big_vision: the inverse of its conversion of PaliGemma, written by itself."""

import numpy as np


def paligemma_arrays(model, *, stacked=True, prefix="params/"):
    """The arrays of an `.npz` of a `PaliGemmaForConditionalGeneration`.

    Args:
      model: whose language model is Gemma or Gemma 2.
      stacked: whether blocks are in one array, as in the released files.
      prefix: of all names.

    Source: transformers, models/paligemma/convert_paligemma{,2}_weights_to_hf.py (4.x), read backwards; big_vision,
    models/ppp/gemma.py and models/vit.py for the names of blocks that are not stacked, and of equal numbers of heads.
    """
    text, vision = model.config.text_config, model.config.vision_config
    state = {key.removeprefix("model."): value.float().numpy() for key, value in model.state_dict().items()}
    heads, kv_heads, head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim

    def named(part, ending):
        (found,) = (value for key, value in state.items() if key.startswith(part) and key.endswith(f".{ending}"))
        return found

    def tower(name):
        return named("vision_tower", name)

    def language(name):
        return named("language_model", name)

    def tower_block(number):
        layer, count = f"layers.{number}", vision.num_attention_heads
        found, attention = {}, "MultiHeadDotProductAttention_0"
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            weight = tower(f"{layer}.self_attn.{theirs}.weight").T
            found[f"{attention}/{ours}/kernel"] = weight.reshape(len(weight), count, -1)
            found[f"{attention}/{ours}/bias"] = tower(f"{layer}.self_attn.{theirs}.bias").reshape(count, -1)
        weight = tower(f"{layer}.self_attn.out_proj.weight").T
        found[f"{attention}/out/kernel"] = weight.reshape(count, -1, weight.shape[1])
        found[f"{attention}/out/bias"] = tower(f"{layer}.self_attn.out_proj.bias")
        for index in (0, 1):
            found[f"LayerNorm_{index}/scale"] = tower(f"{layer}.layer_norm{index + 1}.weight")
            found[f"LayerNorm_{index}/bias"] = tower(f"{layer}.layer_norm{index + 1}.bias")
            found[f"MlpBlock_0/Dense_{index}/kernel"] = tower(f"{layer}.mlp.fc{index + 1}.weight").T
            found[f"MlpBlock_0/Dense_{index}/bias"] = tower(f"{layer}.mlp.fc{index + 1}.bias")
        return found

    def language_block(number):
        layer = f"layers.{number}"

        def projection(name, count):  # [count * head_dim, width] -> [count, width, head_dim]
            weight = language(f"{layer}.self_attn.{name}_proj.weight")
            return weight.reshape(count, head_dim, -1).transpose(0, 2, 1)

        query, key, value = projection("q", heads), projection("k", kv_heads), projection("v", kv_heads)
        if heads == kv_heads:
            found = {"attn/qkv_einsum/w": np.stack([query, key, value])}
        else:
            found = {"attn/q_einsum/w": query, "attn/kv_einsum/w": np.stack([key, value])}
        out = language(f"{layer}.self_attn.o_proj.weight")  # [width, heads * head_dim]
        found["attn/attn_vec_einsum/w"] = out.reshape(-1, heads, head_dim).transpose(1, 2, 0)
        gates = [language(f"{layer}.mlp.{name}_proj.weight").T for name in ("gate", "up")]
        found["mlp/gating_einsum"] = np.stack(gates)
        found["mlp/linear"] = language(f"{layer}.mlp.down_proj.weight").T
        norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
        if text.model_type == "gemma2":
            norms |= {"post_attention_norm": "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
            norms |= {"post_ffw_norm": "post_feedforward_layernorm"}
        return found | {f"{ours}/scale": language(f"{layer}.{theirs}.weight") for ours, theirs in norms.items()}

    arrays = {
        "img/embedding/kernel": tower("patch_embedding.weight").transpose(2, 3, 1, 0),
        "img/embedding/bias": tower("patch_embedding.bias"),
        "img/pos_embedding": tower("position_embedding.weight")[None],
        "img/Transformer/encoder_norm/scale": tower("post_layernorm.weight"),
        "img/Transformer/encoder_norm/bias": tower("post_layernorm.bias"),
        "img/head/kernel": named("multi_modal_projector", "linear.weight").T,
        "img/head/bias": named("multi_modal_projector", "linear.bias"),
        "llm/embedder/input_embedding": language("embed_tokens.weight"),
        "llm/final_norm/scale": language("norm.weight"),
    }
    towers = [tower_block(number) for number in range(vision.num_hidden_layers)]
    blocks = [language_block(number) for number in range(text.num_hidden_layers)]
    for each, whole, one in (
        (towers, "img/Transformer/encoderblock", "img/Transformer/encoderblock_{}"),
        (blocks, "llm/layers", "llm/layers/{}"),
    ):
        if stacked:
            arrays |= {f"{whole}/{name}": np.stack([block[name] for block in each]) for name in each[0]}
        else:
            arrays |= {f"{one.format(i)}/{name}": block[name] for i, block in enumerate(each) for name in block}
    return {prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()}
