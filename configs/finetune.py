r"""LLaVA-1.5 7B, from its released weights, on pictures and questions of your own.

    python -m vlm_jax.cli.convert --source=llava-hf/llava-1.5-7b-hf --target=orbax
    python -m vlm_jax.cli.train --config=configs/finetune.py --workdir=run --init_from=orbax \
        --config.processor.tokenizer=orbax/tokenizer.json \
        --config.data.train_path=train.jsonl --config.data.evaluation_path=evaluation.jsonl
    python -m vlm_jax.cli.convert --source=orbax --run=run --target=finetuned

Another release is another preset. Rows are the run's own (image, question, answer), without the release's chat
template, which a tokenizer of records does not write. Source of the stage: Liu et al. 2023 (LLaVA-1.5), table 9.
"""

from ml_collections import ConfigDict

from configs import base
from configs.presets import llava, system


def get_config(arg: str = "") -> ConfigDict:
    """Connector and language model learn to answer, the tower is frozen; `smoke` shrinks model, data and steps."""
    config = base.get_config()
    system.take(config, llava.llava_1_5_7b())
    config.dtype = "bfloat16"
    config.mesh.update({"data": 1, "fsdp": -1})
    config.stages = ConfigDict(
        {
            "instruction": {
                "objective": "next_token",
                "stream": "questions",
                "steps": 5000,
                "batch_size": 128,
                "warmup_steps": 150,
                "learning_rates": {"connector": 2e-5, "decoder": 2e-5},
            }
        }
    )
    config.schedule = ("instruction",)
    config.optimizer.update({"b2": 0.999, "weight_decay": 0.0})
    config.processor.independent_turns = False
    config.row.text_length = 1472
    config.evaluation.question_length = 256
    if arg == "smoke":
        _shrink(config)
        return config.lock()
    if arg:
        raise ValueError(f"this config takes smoke, not '{arg}'")
    config.data = ConfigDict({"kind": "vqa_files", "train_path": "train.jsonl", "evaluation_path": "evaluation.jsonl"})
    config.processor.tokenizer = "tokenizer.json"
    return config.lock()


def _shrink(config: ConfigDict) -> None:
    """Blocks of the release's kind at the sizes of `base`, on pages of digits."""
    small = base.get_config()
    sizes = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
    config.encoder.update({**sizes, "patch_size": small.encoder.patch_size})
    config.decoder.update({**sizes, "num_kv_heads": 2})
    del config.decoder["vocab_size"]
    config.processor, config.row, config.evaluation = small.processor, small.row, small.evaluation
    config.token_budget = small.token_budget
    config.data.evaluation_size = 4
    config.evaluation.batch_size = 16
    config.stages.instruction.update({"steps": 4, "warmup_steps": 1, "batch_size": 8})
