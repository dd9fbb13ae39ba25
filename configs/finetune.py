r"""Fine-tunes a release on your own conversations about images, with its processor and chat template.

    python -m vlm_jax.cli.train --config=configs/finetune.py --workdir=run \
        --config.release=llava-hf/llava-1.5-7b-hf \
        --config.data.train_path=train.json --config.data.evaluation_path=evaluation.json

`--config.token_budget=64 --config.reducer.kind=visionzip` trains with fewer visual tokens, and
`--config.connector.kind=resampler` with another connector, randomly initialised.
Pairs of answers, `{"prompt": …, "chosen": …, "rejected": …, "images": […]}`, are learned by a stage with the objective
`prefer`, the stream `preferences`, and the keys `beta`, `label_smoothing` and `logits_bytes`.
Source of the stage: Liu et al. 2023 (LLaVA-1.5), table 9.
"""

from ml_collections import ConfigDict

from configs import base, digits_stages
from vlm_jax.train import finetuning


def get_config(arg: str = "") -> ConfigDict:
    """Connector and language model learn to answer, the tower is frozen; `smoke` is a small model of digits."""
    if arg == "smoke":
        return _smoke()
    if arg:
        raise ValueError(f"this config takes smoke, not '{arg}'")
    config = finetuning.get_config()
    config.release, config.dtype, config.param_dtype = "llava-hf/llava-1.5-7b-hf", "bfloat16", "float32"
    config.data.update({"train_path": "train.jsonl", "evaluation_path": "evaluation.jsonl", "held_out": 0})
    config.row.update({"length": 2048, "images": 1, "pack": False})
    stage = {"steps": 5000, "batch_size": 128, "accumulate": 1, "warmup_steps": 150}
    config.stages.instruction.update(stage)
    config.stages.instruction.learning_rates = ConfigDict({"connector": 2e-5, "decoder": 2e-5})
    config.decoder.remat, config.evaluation.batch_size = "dots", 16
    return config.lock()


def _smoke() -> ConfigDict:
    config = base.get_config()
    stage = finetuning.get_config().stages.instruction
    stage.update({"steps": 4, "batch_size": 8, "accumulate": 1, "warmup_steps": 1})
    stage.learning_rates = ConfigDict({"connector": 2e-5, "decoder": 2e-5})
    config.stages, config.schedule = ConfigDict({"instruction": stage}), ("instruction",)
    config.optimizer.update({"b2": 0.999, "weight_decay": 0.0})
    digits_stages.shrink(config.stages)
    config.data.evaluation_size = 4
    config.evaluation.batch_size = 16
    return config.lock()
