"""Advice that no test follows yet: parts of messages, file by file. It only shrinks; see `test_tried_advice.py`."""

UNTRIED = [
    # pretrained/budgets.py
    "{}.kind: {} returns {} features, for which the connector gives {} tokens; choose another",
    # pretrained/configured.py
    "config.token_budget: a {} has no visual tokens to count; set it to None",
    "config.{}.kind: a {} has no {}; set it to None",
    # pretrained/convert.py
    "{}: this run started from {}, whose parameters an adapter folder does not have; export",
    "{}: this run also trained {}, which an adapter folder does not have; export it whole",
    # pretrained/known_system.py
    "pass the folder",
    # pretrained/named_tower.py
    "Download the tower and set {} to its folder ({})",
    # pretrained/pretrained.py
    "call apply for features",
    # pretrained/smaller_tile.py
    "{} leaves no grid inside {}x{} of which {} makes {}x{} tokens; choose another reducer",
    "{} leaves a grid of tokens, and a tile has {}, which are more than its {}x{} grid (a",
    # build/__init__.py
    "train it with --config=configs/finetune_towers.py",
    "set the most pictures that a row has",
    "train it by cli.train with a config such as configs/finetune_towers.py",
    # build/image_text.py
    "name the classes with the kind class_head",
    # build/vision.py
    "use 'feature', which joins them, with hybrid_mlp",
    # checkpoints/hub.py
    "Convert it once if you trust it: tensors = torch.load(FILE, map_location='cpu',",
    # checkpoints/orbax.py
    "free space or fix the permissions, and rerun the same command to resume",
    # checkpoints/peft.py
    "Merge it with peft (merge_and_unload) and load the merged model",
    "take it out of config.lora.target, or export the run as a whole release",
    # checkpoints/runs.py
    "train with config.lora, or export it whole",
    # cli/command.py
    "{}; rerun the same command to resume",
    "free space on {}, and rerun the same command to resume",
    # cli/convert.py
    "pass one, or --dry-run",
    # cli/generate.py
    "create it, or name another file",
    # cli/plan.py
    "--workdir: expected the folder of the sweep's files; pass one",
    # cli/train.py
    "--export: a run without config.release has no released format; omit the flag",
    "--export: the release has no names for another {}; omit the flag",
    "use cli.convert --run afterwards",
    "config.{}: the config has no such key; omit --{}",
    # connectors/hybrid_mlp.py
    "change an encoder's image or patch size",
    # connectors/qformer.py
    "pass one",
    "leave it out",
    # decoders/deepseek.py
    "set config.decoder.balance_weight to 0, or choose a reducer that acts before the",
    # models/vlm.py
    "set its combine to 'feature'",
    "set reduce to 'tokens', so that it acts after the connector",
    "set reduce to 'features'",
    # planner/inference.py
    "plan --stage=train",
    # reducers/behind_connector.py
    "use a connector of squares (concat, pixel_shuffle, visual_vocabulary)",
    # reducers/reducer.py
    "set {}, as build does",
    # reducers/visionzip.py
    "{}: the rule 'as_released' needs a class token: set {}",
]
