"""Advice that no test follows yet: parts of messages, file by file. It only shrinks; see `test_tried_advice.py`."""

UNTRIED = [
    # pretrained/budgets.py
    "{}.token_budget: this model has no encoder with a decoder; leave it out",
    "{}.kind: {} returns {} features, for which the connector gives {} tokens; choose another",
    # pretrained/configured.py
    "config.token_budget: a {} has no visual tokens to count; set it to None",
    "config.{}.kind: a {} has no {}; set it to None",
    # pretrained/convert.py
    "{}: this run started from {}, whose parameters an adapter folder does not have; export",
    "{}: this run also trained {}, which an adapter folder does not have; export it whole",
    # pretrained/known_system.py
    "pass the folder",
    # pretrained/loader.py
    "pass a release",
    # pretrained/named_tower.py
    "Download the tower and set {} to its folder ({})",
    # pretrained/pretrained.py
    "pass the processor both",
    "call apply for features",
    # pretrained/processing/llava_hf.py
    "set vision_feature_select_strategy to 'default'",
    # pretrained/recognition.py
    "load it with from_pretrained('{}', adapter='{}')",
    # pretrained/smaller_tile.py
    "{} leaves no grid inside {}x{} of which {} makes {}x{} tokens; choose another reducer",
    "{} leaves a grid of tokens, and a tile has {}, which are more than its {}x{} grid (a",
    # build/__init__.py
    "train it with --config=configs/finetune_towers.py",
    "set the most pictures that a row has",
    "train it by cli.train with a config such as configs/finetune_towers.py",
    "remove the stage",
    "change config.encoder.patch_size",
    # build/image_text.py
    "name the classes with the kind class_head",
    # build/sections.py
    "see configs/base.py",
    # build/vision.py
    "use 'feature', which joins them, with hybrid_mlp",
    # analysis/attention_distance.py
    "pass the grid of the images that the weights were computed from",
    # analysis/token_maps.py
    "pass the grid of the features that token_maps was called with",
    # budget.py
    "config.token_budget: {} tokens are {}; nearest feasible: {}",
    # checkpoints/hub.py
    "Convert it once if you trust it: tensors = torch.load(FILE, map_location='cpu',",
    "download the repository elsewhere and pass the path of its folder",
    # checkpoints/orbax.py
    "free space or fix the permissions, and rerun the same command to resume",
    # checkpoints/peft.py
    "Merge it with peft (merge_and_unload) and load the merged model",
    "take it out of config.lora.target, or export the run as a whole release",
    # checkpoints/release.py
    "save the parameters as a run does, or load the release without the replacement",
    # checkpoints/runs.py
    "train with config.lora, or export it whole",
    # checkpoints/saving.py
    "cast to a numeric dtype",
    # cli/command.py
    "--workdir: expected the folder of the run; pass one",
    "Pass --help for the flags",
    "{}; rerun the same command to resume",
    "free space on {}, and rerun the same command to resume",
    # cli/convert.py
    "pass one, or --dry-run",
    # cli/generate.py
    "create it, or name another file",
    # cli/plan.py
    "pass --stage=train",
    "--context: is for generation; pass --stage=prefill or --stage=decode",
    "{}: of --sweep only; pass --sweep",
    "--largest_batch: is for generation; pass --stage=prefill or --stage=decode",
    "--workdir: expected the folder of the sweep's files; pass one",
    # cli/train.py
    "--export: a run without config.release has no released format; omit the flag",
    "--export: the release has no names for another {}; omit the flag",
    "use cli.convert --run afterwards",
    "config.{}: the config has no such key; omit --{}",
    # config.py
    "{}.{}: this value is derived from the rest of the config; remove the key",
    # connectors/hybrid_mlp.py
    "change an encoder's image or patch size",
    # connectors/matryoshka.py
    "choose budgets whose grids divide",
    # connectors/qformer.py
    "pass one",
    "leave it out",
    # connectors/solving.py
    "choose an image size that gives multiples of {} patches",
    # costs/flops.py
    "count the FLOPs of its body instead",
    # costs/kernels.py
    "give it a cost_estimate, or add it to KERNELS",
    # decoders/deepseek.py
    "leave these fields out",
    "set config.decoder.balance_weight to 0, or choose a reducer that acts before the",
    # encoders/aimv2.py
    "saliency is that of a last block, without collected states: leave out `collect`",
    # encoders/multiscale.py
    "give either scales or image_sizes, got {} and {}",
    "change the scale or max_split_size",
    # encoders/packed.py
    "an image of {}x{} pixels cannot be divided into blocks of {}x{} patches of {} pixels;",
    "pack with this merge_size",
    # encoders/resnet.py
    "resize the images to image_size",
    # encoders/trunk.py
    "set pooling to 'none' and leave representation_size and projection_dim out",
    "leave out `collect` and levels, with `merged` also keep_class_token, and select a",
    # encoders/vit.py
    "set class_token too",
    # evals/retrieval.py
    "expected a text for every image, got none for image {} ({} such); remove it",
    "pass text_image, the image of each text",
    # generation/buckets.py
    "add one of {} or more to buckets, or shorten the prompt",
    "raise cache_length, shorten the prompt, or reduce max_new_tokens",
    "put each prompt in a separate row, with segment id {}",
    "put each branch in a separate row, with branch_ids=None",
    # generation/engine.py
    "use apply() for its outputs, or load a release with one",
    "check the parameters and the images for NaN, or compute in float32",
    # generation/released.py
    "pass sampling=Sampling({})",
    # generation/sampling.py
    "set a temperature above 0",
    # layers/attention/entry.py
    "{} attention takes no bias; leave `implementation` None",
    "splash attention takes no mask of {}; leave `implementation` None",
    # layers/rope.py
    "positions have three axes, but a Rope without sections takes one; set sections",
    # layers/squares.py
    "pack patches with a merge_size that is a multiple of {}",
    "use a connector that takes blocks (concat, pixel_shuffle, visual_vocabulary)",
    # layers/windowed_stack.py
    "saliency is of the last layer, without collected states: leave out `collect`",
    "pass `window` to processors.patches.pack_patches",
    # losses/exchange.py
    "expected a batch divisible by the {} devices along mesh axis {}, got {} examples; use {}",
    # models/vlm.py
    "call it, or visual_tokens, for visual tokens",
    "set its combine to 'feature'",
    "set reduce to 'tokens', so that it acts after the connector",
    "set reduce to 'features'",
    # optim/adamw.py
    "set {} to float32, or {} to at most {}",
    # optim/patterns.py
    "choose a part with layers, such as a transformer",
    "give each a key",
    "write one that is",
    "keep one of the two",
    # planner/inference.py
    "plan --stage=train",
    "set a multiple of {}, or more of tensor",
    # planner/search.py
    "start at a larger --batch_size",
    # planner/topology.py
    "install libtpu, the compiler of TPUs, which runs on any CPU: pip install",
    # reducers/behind_connector.py
    "use a connector of squares (concat, pixel_shuffle, visual_vocabulary)",
    # reducers/reducer.py
    "set {}, as build does",
    # reducers/visionzip.py
    "{}: the rule 'as_released' needs a class token: set {}",
    # sources.py
    "{}: not read within {} seconds; download it",
    "{}: ended after {} of {} bytes; download it",
    "download it, or pass allow_network=True",
    "download it and pass a path",
    # system.py
    "call processor(images=…, texts=…) and logits, encode_images or encode_texts",
    "use its run's checkpoints",
]
