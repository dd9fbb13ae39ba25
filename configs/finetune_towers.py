r"""Fine-tunes a released CLIP or SigLIP on your own images with captions, with its processor.

    python -m vlm_jax.cli.train --config=configs/finetune_towers.py --workdir=run \
        --config.release=google/siglip-base-patch16-224 \
        --config.data.train_path=train.json --config.data.evaluation_path=evaluation.json

A record has one image and a caption, `{"image": "a.jpg", "caption": "a cat"}`, or a conversation, whose last answer is
the caption. CLIP was trained with `--config.stages.pairs.loss=softmax`; a stage without a learning rate of `image` is
locked-image tuning.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import siglip_digits


def get_config(arg: str = "") -> ConfigDict:
    """Both towers, their scale and any bias; `smoke` is a small model of digits."""
    config = siglip_digits.get_config(arg).unlock()
    config.stages.pairs.learning_rates = ConfigDict({"image": 1e-5, "text": 1e-5, "*": 1e-5})
    config.optimizer.update({"b2": 0.999, "weight_decay": 0.0})
    if arg == "smoke":
        return config.lock()
    config.stages.pairs.update({"steps": 2000, "batch_size": 256, "warmup_steps": 100})
    config.release = "google/siglip-base-patch16-224"
    config.mesh.update({"data": 1, "fsdp": -1})
    config.processor = ConfigDict({"max_pixels": placeholder(int)})
    config.encoder, config.decoder, config.row = ConfigDict(), ConfigDict(), ConfigDict()
    config.connector = ConfigDict({"kind": placeholder(str)})
    config.data = ConfigDict(
        {
            "kind": "conversations",
            "train_path": "train.jsonl",
            "evaluation_path": "evaluation.jsonl",
            "mixture": {},
            "num_images": 1,
            "tasks": ("caption",),
            "columns": {},
            "tags": {},
            "max_corrupt": 0,
            "max_pixels": 100_000_000,
            "evaluation_size": placeholder(int),
            "max_checked": 200_000,
        }
    )
    return config.lock()
