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
from ml_collections.config_dict import placeholder

from configs import base, digits_stages


def get_config(arg: str = "") -> ConfigDict:
    """Connector and language model learn to answer, the tower is frozen; `smoke` is a small model of digits."""
    config = base.get_config()
    stage = {
        "objective": "next_token",
        "stream": "questions",
        "steps": 5000,
        "batch_size": 128,
        "accumulate": 1,
        "warmup_steps": 150,
        "learning_rates": {"connector": 2e-5, "decoder": 2e-5},
        "layer_decay": {},
        "z_loss": 0.0,
        "logits_bytes": placeholder(int),
    }
    config.stages = ConfigDict({"instruction": stage})
    config.schedule = ("instruction",)
    config.optimizer.update({"b2": 0.999, "weight_decay": 0.0})
    if arg == "smoke":
        digits_stages.shrink(config.stages)
        config.data.evaluation_size = 4
        config.evaluation.batch_size = 16
        return config.lock()
    if arg:
        raise ValueError(f"this config takes smoke, not '{arg}'")
    config.release = "llava-hf/llava-1.5-7b-hf"
    config.dtype = "bfloat16"
    config.token_budget = placeholder(int)
    config.mesh.update({"data": 1, "fsdp": -1})
    config.encoder, config.connector, config.decoder = (
        ConfigDict(),
        ConfigDict({"kind": placeholder(str)}),
        ConfigDict(),
    )
    config.processor = ConfigDict({"max_pixels": placeholder(int), "max_length": placeholder(int)})
    config.row.update({"text_length": placeholder(int), "length": 2048, "images": 1})
    config.evaluation.update({"batch_size": 16, "question_length": placeholder(int), "max_new_tokens": 64})
    config.data = ConfigDict(
        {
            "kind": "conversations",
            "train_path": "train.jsonl",
            "evaluation_path": "evaluation.jsonl",
            "mixture": {},  # files by name, {"path": "a.json", "weight": 2.0}, instead of train_path
            "num_images": placeholder(int),
            "tasks": ("vqa",),
            "columns": {},
            "tags": {},
            "max_corrupt": 0,
            "max_pixels": 100_000_000,
            "evaluation_size": placeholder(int),
            "max_checked": 200_000,
        }
    )
    return config.lock()
