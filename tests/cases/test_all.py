"""Every reported fault has a test whose name begins with its number: `test_07_…`, or `test_09_28_…` for two."""

import ast
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).parent
# Reports, by number and name.
CASES = {
    "inference": (
        "01_image_url_item",
        "03_string_content",
        "05_file_url",
        "07_image_path_key",
        "08_pixels_of_an_item",
        "10_sampling_of_the_folder",
        "12_trimmed_mp4",
        "14_thin_picture",
        "15_generation_config",
        "16_end_ids_of_other_types",
        "17_token_outside_the_table",
        "18_gptq",
        "20_lora_folder",
        "22_template_in_processor_config",
        "23_image_token_of_the_tokenizer",
        "24_tools_as_functions",
        "26_frame_rate",
        "27_dtype_of_what_is_saved",
        "29_open_clip_config",
        "30_mark_in_a_question",
        "31_settings_of_other_types",
    ),
    "training": (
        "01_clip_norm_zero",
        "02_cadence_zero",
        "04_seed_range",
        "05_typo_claims_workdir",
        "06_evaluation_fault_after_training",
        "07_init_from_ignored",
        "08_init_from_workdir",
        "09_tilde",
        "10_encodings",
        "12_image_placeholder",
        "15_batch_not_divisible",
        "17_sweep_workers_share_a_folder",
        "18_sweep_failed_point",
        "20_nan_parameters_saved",
        "21_bfloat16_moments",
        "22_evaluation_memory",
        "25_markup",
        "26_keys_of_the_data_on_the_command_line",
        "27_unicode_forms",
        "28_another_directory",
        "30_json_forms",
        "32_loop_keys_of_a_finished_run",
        "33_config_argument",
        "36_two_runs_at_once",
        "39_progress_in_a_log",
        "45_workdir_with_a_log",
    ),
}
# Tests of commands as processes of their own.
ELSEWHERE = {"inference": (), "training": (HERE.parent / "processes" / "test_case_commands.py",)}


@pytest.mark.parametrize("kind", CASES)
def test_every_case_has_a_test_and_every_test_names_its_case(kind):
    found, unnamed = set[int](), []
    for path in (*sorted((HERE / kind).glob("test_*.py")), *ELSEWHERE[kind]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                numbers = re.match(r"test_((?:\d\d_)*)", node.name)[1]
                found |= {int(number) for number in numbers.split("_") if number}
                if not numbers:
                    unnamed.append(f"{path.name}: {node.name}")
    assert not unnamed and found == {int(name[:2]) for name in CASES[kind]}
