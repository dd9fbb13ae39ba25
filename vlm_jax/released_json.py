"""The one reader of the JSON files of a released folder: the form of every key that is read, checked at reading.

A key has the same form in all files and sections, so that one table serves config.json and the settings of processors,
tokenizers and generation alike. Keys without a form are not read by anything.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlm_jax.config import read_json

_HUGE = 1e30


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of the value of a key.

    Attributes:
      expected: in words, for errors.
      accepts: whether a value has it.
    """

    expected: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: "Form") -> "Form":
        """Either of two forms."""
        return Form(f"{self.expected} or {other.expected}", lambda value: self.accepts(value) or other.accepts(value))


def whole(least: int, most: int) -> Form:
    """A whole number from `least` to `most`."""
    return Form(
        f"a whole number from {least} to {most}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


def number(least: float | int, most: float | int, *, above: bool = False) -> Form:
    """A finite number from `least`, or above it, to `most`."""

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (least < value if above else least <= value) and value <= most

    upper = "" if most >= _HUGE else f" to {most:g}"
    return Form(f"a number {'above' if above else 'from'} {least:g}{upper}", accepts)


def list_of(form: Form, *lengths: int, most: int = 1 << 16) -> Form:
    """A list whose items have one form; of one of the lengths if any is given, and at most of `most` items."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) > most or (lengths and len(value) not in lengths):
            return False
        return all(map(form.accepts, value))

    words = f" of {' or '.join(map(str, lengths))} items" if lengths else ""
    return Form(f"a list{words}, each {form.expected}", accepts)


def mapping(words: str, value: Form | None = None, *, required: tuple[str, ...] = ()) -> Form:
    """A JSON object, whose values have one form if it is given, and which has all of the `required` keys."""

    def accepts(given: Any) -> bool:
        if not isinstance(given, Mapping) or any(key not in given for key in required):
            return False
        return value is None or all(map(value.accepts, given.values()))

    return Form(words, accepts)


# Bounds are far above any release, and far below what would fill a machine's memory.
NULL = Form("null", lambda value: value is None)
FLAG = Form("true or false", lambda value: isinstance(value, bool))
INDEX_TEXT = Form(
    "a text such as '3|7'", lambda value: isinstance(value, str) and all(map(str.isdecimal, value.split("|")))
)
TEXT = Form("a text", lambda value: isinstance(value, str))
COUNT = whole(1, 1 << 20)  # widths, heads, groups
AT_LEAST_0 = whole(0, 1 << 20)
DEPTH = whole(1, 1 << 12)
ROWS = whole(1, 1 << 24)  # of vocabularies and of tables of positions
MAX_SIDE = 1 << 12
SIDE = whole(1, MAX_SIDE)  # pixels
AREA = whole(1, (1 << 31) - 1)
LARGE_AREA = whole(1, (1 << 53) - 1)  # a limit of a whole video, which some releases set to practically none
TILES = whole(0, 256)  # of an image; all grids of as many are listed
INDEX = whole(-(1 << 12), 1 << 12)  # of a layer
ID = whole(0, (1 << 31) - 1)
NUMBER, POSITIVE = number(-_HUGE, _HUGE), number(0, _HUGE, above=True)
FRACTION = number(0, 1)
SIDES = SIDE | list_of(SIDE, 2)
TOKEN = TEXT | Form(
    "an object with the text content",
    lambda value: isinstance(value, Mapping) and isinstance(value.get("content"), str),
)
STATISTICS = NUMBER | list_of(NUMBER, 1, 3)
SECTION = mapping("an object")
PAIR = list_of(SIDE, 2)
NAMED_SIZE = mapping("an object of whole numbers, such as height and width", whole(1, (1 << 53) - 1) | NULL)
TEMPLATES = list_of(mapping("an object with name and template", TEXT, required=("name", "template")))

# Towers of DeepSeek-OCR, whose `width` is an object with the sizes of each by these names.
TOWERS = {"sam_vit_b", "clip-l-14-224", "qwen2-0-5b"}
# Sections whose keys are read; other nested objects are not.
SECTIONS = {
    *("text_config", "llm_config", "language_config", "text_config_dict", "text_cfg", "text"),
    *("vision_config", "vit_config", "vision_config_dict", "vision_tower_config", "vision_cfg", "visual", "image"),
    *("high_res_vision_config", "high_res_cfg", "low_res_cfg", "visual_tokenizer_config", "backbone_config"),
    *("projector_config", "aligner_config", "qformer_config", "perceiver_config", "params"),
    *("sam_config", "encoder_config"),
    *TOWERS,
    "thinker_config",
    *("model", "model_cfg", "preprocess_cfg", "resnet", "transformer", "image_processor", "video_processor"),
    *("img", "llm"),
    "video_sampling",
}
# Sections of some releases that are names in others.
NAMES = ("model", "image", "text")


def _table(*rows: tuple[Form, str]) -> dict[str, Form]:
    return {key: form for form, keys in rows for key in keys.split()}


# Key -> its form, wherever it is.
FORMS: dict[str, Form] = _table(
    # config.json: sizes
    (
        COUNT,
        """hidden_size intermediate_size num_attention_heads embed_dim width heads num_heads out_hidden_size
        output_channels output_dim n_embed input_dim kv_channels
        projection_dim num_channels n_queries num_query_tokens encoder_hidden_size
        resampler_n_heads resampler_n_latents resampler_head_dim hidden_stride spatial_merge_size temporal_patch_size
        head_width moe_layer_freq cross_attention_frequency num_visual_indicator_tokens merge_size mm_hidden_size
        tokens_per_second in_channels in_chans prompt_embed_dim num_position_embeddings scale_factor
        text_hidden_size sliding_window_pattern mm_tokens_per_image global_head_dim pooling_kernel_size dim
        full_attention_interval linear_conv_kernel_dim position_id_per_seconds linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads num_kv_heads
        shared_expert_intermediate_size merger_times""",
    ),
    (
        COUNT | NULL,
        """num_key_value_heads head_dim mlp_dim projection_size kv_lora_rank q_lora_rank n_routed_experts
        n_shared_experts num_experts_per_tok n_group topk_group pooler_output_size representation_size nposemb
        max_num_patches num_experts num_local_experts num_global_key_value_heads moe_intermediate_size top_k_experts""",
    ),
    (AT_LEAST_0 | NULL, "num_classes"),
    (AT_LEAST_0, "hidden_size_per_layer_input num_kv_shared_layers"),
    (INDEX, "insert_layer_id"),
    (PAIR, "merge_kernel_size window_kernel_size"),
    (AT_LEAST_0, "num_register_tokens first_k_dense_replace qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (DEPTH, "depth num_hidden_layers resampler_depth"),
    (DEPTH | list_of(DEPTH, 4), "layers"),
    (DEPTH | list_of(DEPTH), "num_layers"),
    (ROWS, "vocab_size vocab_size_per_layer_input max_position_embeddings seq_length context_length"),
    (ROWS, "visual_vocab_size position_embedding_size"),
    (ROWS | NULL, "original_max_position_embeddings model_max_len tokenizer_model_max_length max_sequence_length"),
    (AT_LEAST_0 | NULL, "sliding_window max_window_layers window_size"),
    (whole(-1, 1 << 20), "num_patches"),
    (SIDES, "image_size"),
    (list_of(SIDE, 1, 2) | NULL, "image_sizes"),
    (list_of(TEXT, 1, 2) | NULL, "timm_model_ids"),
    (list_of(TEXT | NULL, 1, 2) | NULL, "timm_override_act_layers"),
    (SIDES | NULL, "patch_size"),
    (FLAG | AT_LEAST_0 | NULL, "rep_size"),
    (list_of(COUNT, most=1 << 12) | NULL, "downsample_channels"),
    (list_of(AT_LEAST_0, most=1 << 12), "global_attn_indexes deepstack_visual_indexes"),
    (list_of(AT_LEAST_0, most=1 << 12) | INDEX_TEXT | NULL, "fullatt_block_indexes"),
    (list_of(TEXT, most=1 << 12) | NULL, "layer_types mlp_layer_types architectures"),
    (INDEX | list_of(INDEX), "vision_feature_layer"),
    (INDEX, "mm_vision_select_layer select_layer"),
    (SIDE | NULL, "force_image_size base_size"),
    (SIDE, "crop_threshold tile_size"),
    (TILES, "min_dynamic_patch max_dynamic_patch min_patches max_patches min_crops max_crops"),
    (list_of(ID, most=1 << 12), "visual_indicator_token_ids"),
    # config.json: numbers
    (
        POSITIVE,
        """temperature_init rope_theta rotary_emb_base rotary_pct tau mlp_ratio
        downsample_ratio routed_scaling_factor rope_local_base_freq query_pre_attn_scalar""",
    ),
    (number(0, 1, above=True), "layer_norm_eps rms_norm_eps layer_norm_epsilon"),
    (NUMBER, "initializer_factor layerscale_value logit_scale_init_value aux_loss_alpha"),
    (NUMBER | NULL, "bias_init layer_scale_init_value partial_rotary_factor"),
    (NUMBER | NULL, "final_logit_softcapping attn_logit_softcapping"),
    (number(0, _HUGE) | NULL, "final_logits_softcap attn_logits_softcap"),
    # config.json: flags and names
    (
        FLAG,
        """attention_bias mlp_bias qkv_bias use_bias qk_normalization tie_word_embeddings bias class_token
        drop_cls_token no_bias scale_attn_weights use_dynamic_ntk use_logn_attn multimodal_projector_bias norm_topk_prob
        preserve_original_pe s2 seq_aux token_pooling use_abs_pos use_rel_pos use_mla use_rope use_sliding_window
        vision_use_head use_mask_token use_mean_pooling use_qk_norm use_absolute_position_embeddings
        use_qformer_text_input use_swiglu_ffn quick_gelu scan dynamic_image_size use_thumbnail pad2square
        standardize use_clipped_linears attention_k_eq_v enable_moe_block use_double_wide_mlp
        post_norms use_gated_mlp query_bias key_bias value_bias proj_bias""",
    ),
    (
        TEXT,
        """model_type model_name hidden_act norm_type mm_projector_type mm_vision_select_feature
        projector_type concat_type ps_version scoring_func select_feature pooler_act projector_hidden_act s2_scales
        tile_tag tokenize_function topk_method vision_feature_select_strategy cls posemb pool_type text_model
        image_model img_model llm_model query_pre_attn_norm
        global_view_pos vision_aspect_ratio vision_backbone_id llm_backbone_id image_resize_strategy downsample_mode""",
    ),
    (
        TEXT | NULL,
        """mm_vision_tower template image_aspect_ratio mm_patch_merge_type conversation_version
        hidden_activation""",
    ),
    (SECTION | NULL, "rope_scaling rope_parameters per_layer_config"),
    (
        Form(
            "an object of numbers and names",
            lambda value: isinstance(value, Mapping) and all(str(key).isdecimal() for key in value),
        )
        | NULL,
        "id2label",
    ),
    (TEXT | list_of(PAIR) | NULL, "image_grid_pinpoints"),
    # generation_config.json, and config.json
    (ID | list_of(ID, most=1 << 12) | NULL, "eos_token_id"),
    (whole(-1, (1 << 31) - 1) | NULL, "pad_token_id bos_token_id"),
    (FLAG | NULL, "do_sample"),
    (POSITIVE | NULL, "repetition_penalty"),
    (number(0, _HUGE) | NULL, "temperature"),
    (number(0, 1) | NULL, "top_p"),
    (AT_LEAST_0 | NULL, "top_k no_repeat_ngram_size"),
    # processors
    (list_of(list_of(COUNT, 3), 1, 2), "input_sizes"),
    (list_of(TEXT, 1, 2) | NULL, "interpolations"),
    (list_of(list_of(NUMBER, 3), 1, 2), "means stds"),
    (
        list_of(mapping("an object with mean and std", required=("mean", "std")), 1, 2) | NULL,
        "tvf_normalize_params",
    ),
    (list_of(whole(0, 255), 3) | NULL, "tvf_letterbox_fill"),
    (STATISTICS | NULL, "image_mean image_std mean std high_res_image_mean high_res_image_std"),
    (SIDE | NAMED_SIZE | list_of(SIDE, 1, 2) | NULL, "size crop_size high_res_size"),
    (NAMED_SIZE | NULL, "max_image_size video_size"),
    (list_of(NUMBER, 3), "pixel_mean pixel_std"),
    (whole(0, 5) | NULL, "resample high_res_resample"),
    (POSITIVE | NULL, "rescale_factor"),
    (
        FLAG | NULL,
        """do_resize do_rescale do_normalize do_center_crop do_pad normalize crop_to_patches do_sample_frames
        add_special_token cap_pixels_per_frame do_image_splitting crop_mode do_pan_and_scan
        use_fused_vision_backbone tvf_do_letterbox slice_mode use_image_id""",
    ),
    (FLAG | TEXT | NULL, "use_bidirectional_attention"),
    (LARGE_AREA | NULL, "min_pixels max_pixels"),
    (POSITIVE | NULL, "fps"),
    (AREA | NULL, "num_frames min_frames max_frames max_video_tokens max_num_frames stack_frames"),
    (TILES, "max_slice_nums"),
    (SIDE, "scale_resolution"),
    (SIDE | NULL, "pan_and_scan_min_crop_size"),
    (whole(1, 256) | NULL, "pan_and_scan_max_num_crops"),
    (whole(1, 1 << 16) | NULL, "max_soft_tokens"),
    (NUMBER | NULL, "audio_ms_per_token"),  # which is no role of a token
    (POSITIVE | NULL, "pan_and_scan_min_ratio_to_activate"),
    (whole(1, 1 << 16) | NULL, "image_seq_length image_seq_len num_image_tokens min_size"),
    (list_of(whole(0, 255), 3) | NULL, "background_color"),
    (list_of(PAIR), "candidate_resolutions"),
    (TEXT, "image_tag sft_format mode interpolation resize_mode"),
    (whole(0, 255) | list_of(whole(0, 255), 3), "fill_color"),
    # tokenizers and templates
    (FLAG | NULL, "add_bos_token add_eos_token legacy do_lower_case"),
    (TEXT | NULL, "tokenizer_class"),
    (list_of(TOKEN) | NULL, "additional_special_tokens"),
    (list_of(TOKEN) | mapping("an object of tokens", TOKEN) | NULL, "extra_special_tokens"),
    (
        Form(
            "an object of ids and tokens",
            lambda value: (
                isinstance(value, Mapping)
                and all(str(key).isdecimal() and TOKEN.accepts(token) for key, token in value.items())
            ),
        ),
        "added_tokens_decoder",
    ),
    (TEXT | TEMPLATES | mapping("an object of texts", TEXT) | NULL, "chat_template"),
    (mapping("an object of file names", TEXT), "weight_map"),
)
# Roles of tokens, whose keys end alike in the files of tokenizers and processors.
ROLE = "_token"
ROLES = tuple(f"{name}{ROLE}" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video"))
# Files that map tokens to ids, without keys of their own.
VOCABULARIES = ("vocab.json", "added_tokens.json")
# Of config.json, numbers of layers, which are built one by one.
DEPTHS = ("depth", "num_hidden_layers", "layers", "resampler_depth")


def read_released(path: Any, error: type[Exception]) -> dict[str, Any]:
    """The object of a JSON file of a released folder, with every value in its form.

    Args:
      path: a `pathlib` or `epath` path.
      error: error class for a file that is missing or has another content; the message names the file, the key, and
        what was expected.
    """
    found = read_json(path, error)
    if path.name in VOCABULARIES:
        for key, value in found.items():
            if not ID.accepts(value):
                raise error(f"{path}: {key!r}: expected {ID.expected}, got {shown(value)}")
        return found
    check_released(found, str(path), error)
    return found


def check_released(settings: Mapping[str, Any], where: str, error: type[Exception]) -> None:
    """Raises an `error` that names every key whose value has another form; `where` is its beginning."""
    wrong = list(_wrong(settings, ""))
    if wrong:
        raise error("\n".join(f"{where}: {line}" for line in wrong))


def shown(value: Any) -> str:
    """A value of JSON for messages: long ones are cut."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _wrong(settings: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in settings.items():
        name = f"{path}{key}"
        form = FORMS.get(key)
        if key == "width" and isinstance(value, Mapping) and value and value.keys() <= TOWERS:
            yield from _wrong(value, f"{name}.")
            form = None
        elif key in SECTIONS and not (key == "visual" and value is False):
            if isinstance(value, Mapping):
                yield from _wrong(value, f"{name}.")
            elif value is not None and not (key in NAMES and isinstance(value, str)):
                yield f"{name}: expected {SECTION.expected}, got {shown(value)}"
        elif form is None and key.endswith(ROLE) and (key in ROLES or not isinstance(value, bool)):
            form = TOKEN | NULL
        if form is not None and not form.accepts(value):
            yield f"{name}: expected {form.expected}, got {shown(value)}"
