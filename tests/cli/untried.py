"""Advice that no test follows yet: parts of messages, file by file. It only shrinks; see `test_tried_advice.py`."""

UNTRIED = [
    # sweep/evaluation.py
    "{} has {} answers to {} questions; use another workdir",
    "repair the images, or use another workdir",
    # sweep/failures.py
    "see {}. The same command tries them again",
    # sweep/frontier.py
    "run the sweep",
    # sweep/hard.py
    "answers of {} and {} differ in their questions: {} and {}; use another --workdir",
    # sweep/points.py
    "set it to None in a sweep",
    "give it a schedule, or take these parts from config.base.release or from shared",
    "{}.trained_at: the candidate trains nothing; remove it",
    "give the candidate a section {} of its own and a schedule that trains it, or take the",
    "choose a connector that nests its budgets, such as matryoshka, or train each",
    # sweep/release_points.py
    "train it with vlm_jax.cli.train, or compare trained connectors with vlm_jax.cli.sweep",
    # sweep/run.py
    "Use another --workdir",
    # pretrained/budgets.py
    "{}.token_budget: this model has no encoder with a decoder; leave it out",
    "start from the release without it",
    "{}.kind: {} needs the grid of one image, but {} packs several of any size into a",
    "choose a reducer that acts on its merged tokens",
    "choose a reducer that acts after the connector",
    "{}.kind: {} works inside the {}, but {} has no blocks of its own; choose another reducer",
    "choose random, uniform_stride or divprune",
    "{}.kind: {} returns {} features, for which the connector gives {} tokens; choose another",
    "{}.kind: {} works inside the {}, but {} does not support it (no field {}); choose another",
    "set a reducer or another connector, which meet a budget exactly",
    # pretrained/configured.py
    "config.token_budget: a {} has no visual tokens to count; set it to None",
    "config.{}.kind: a {} has no {}; set it to None",
    # pretrained/convert.py
    "{}: this run started from {}, whose parameters an adapter folder does not have; export",
    "{}: this run also trained {}, which an adapter folder does not have; export it whole",
    "pass another --target, or remove it",
    "{}: released files are written to a local folder; pass one",
    "free space, fix the permissions, or pass another --target",
    # pretrained/hugging_face.py
    "set it to false",
    # pretrained/known_system.py
    "name a whole system",
    "pass the folder",
    # pretrained/loader.py
    "pass a release",
    # pretrained/named_tower.py
    "Download the tower and set {} to its folder ({})",
    # pretrained/pretrained.py
    "pass the processor both",
    "call apply for features",
    "{}: is set by generate; remove it",
    # pretrained/processing/__init__.py
    "set size and crop_size, or patch_size, in preprocessor_config.json, or size in",
    "fix image_seq_length, num_image_tokens or the image size in the files",
    # pretrained/processing/image_text.py
    "pass image_size in pixels to from_pretrained, or add it to config.json, next to model",
    "use the tokenizer of its training: c4_en (32000) or mc4 (250000) for SigLIP, Gemma's",
    # pretrained/processing/llava_hf.py
    "set vision_feature_select_strategy to 'default'",
    # pretrained/processing/settings.py
    "name a pad_token of the table in tokenizer_config.json",
    # pretrained/recognition.py
    "load the release that is not quantised, or save it dequantised once:",
    "load it with from_pretrained('{}', adapter='{}')",
    "load the release's safetensors, or convert it once:",
    # pretrained/smaller_tile.py
    "{} leaves no grid inside {}x{} of which {} makes {}x{} tokens; choose another reducer",
    "{} gives the connector fewer features, but the queries of {} make {} tokens all the",
    "{} leaves a grid of tokens, and a tile has {}, which are more than its {}x{} grid (a",
    "{} needs a {}x{} grid of features, and {} gives {} of {}x{} pixels; choose another reducer",
    # train/claim.py
    "{}: expected a folder, found a file; use another --workdir",
    "{} has {} and no {}, so it is not a run's folder; use another --workdir",
    "use another --workdir, or the original --init_from",
    "use another --workdir, or the original config. In the folder (here) and in this run",
    # train/first_run.py
    "pass --data=FILE",
    # train/lock.py
    "wait until it ends, stop it, or use another --workdir",
    # train/loop.py
    "lower the stage's learning_rates or clip_norm in a new run, or go on without such",
    # train/objectives/classify.py
    "set config.decoder.kind to class_head",
    # train/objectives/contrastive.py
    "set or remove it",
    "set config.decoder.kind to text_tower",
    "{}.accumulate: the loss of contrastive is over all pairs of the batch, which",
    # train/objectives/objective.py
    "plan another stage",
    "use contrastive for two towers, classify for a classifier",
    # train/stages.py
    "set batch_size to a multiple of {} x accumulate",
    # train/writers.py
    "pip install 'vlm_jax[{}]', or remove it from the writers",
    # build/__init__.py
    "config.token_budget_per: the budget of a release is per image, or per tile; set it",
    "train it with --config=configs/finetune_towers.py",
    "config.evaluation.question_length: prompts of a release have any length; set it to",
    "set the most pictures that a row has",
    "train it by cli.train with a config such as configs/finetune_towers.py",
    "choose another config.{}.kind, such as {}, or another reducer",
    "remove the stage",
    "change config.encoder.patch_size",
    # build/image_text.py
    "config.token_budget: this model has no visual tokens to count; set it to None",
    "config.token_budget_per: this model has no visual tokens to count; set it to image",
    "config.reducer.kind: this model has no visual tokens to reduce; set it to none",
    "name the classes with the kind class_head",
    # build/sections.py
    "see configs/base.py",
    # build/settings.py
    "config.processor.special_tokens: the built-in tokenizer has its own; remove them",
    # build/vision.py
    "use 'feature', which joins them, with hybrid_mlp",
    # processors/chat.py
    'pass its JSON schema, {{"type": "function", "function": {{…}}}}',
    "give it in a role and in items that it reads",
    "Put the release's template into chat_template.jinja",
    "{}: message {}: the template does not read the key '{}'; remove it",
    # processors/conversation.py
    "{}: expected a list of messages, got {}; write [{}]",
    "write [message]",
    "pass them in one of the two",
    "pass one item for every {}",
    # processors/image_text.py
    "pass images=[…], texts=[…] or both",
    # processors/items.py
    "{}: {}.{} is not read; remove it",
    "{}: content: expected a text or a list of items, got {}; write [item]",
    "message {}: the key '{}' is not read by this model's prompt; remove it",
    # processors/learned.py
    "make the chat template write a space or a special token there",
    "put {{% generation %}} and {{% endgeneration %}} around the assistant's text in the",
    "message {}: {}: only an assistant's message is learned, and this one has the role {};",
    # processors/patches.py
    "frames of {}x{} pixels cannot be divided into blocks of {}x{} patches of {} pixels;",
    "pass a multiple of {} that is at least {}, or fewer images",
    "resize the images to multiples of {} patches",
    # processors/plain_prompt.py
    "leave them out",
    # processors/processor.py
    "name: is set by batch; remove it",
    "shorten it or pass fewer or smaller images (nothing is truncated)",
    "remove its other settings",
    'pass one {{"type": "{}"}} item in the messages for every {}{}',
    "rename the file",
    # processors/prompt.py
    "remove turns={} and the keys loss and weight of messages",
    "give them in a message of a role, and in a form, that it reads",
    # processors/tokenizer.py
    "save the tokenizer as a tokenizer.json",
    "use the names in the vocabulary",
    "leave it out of the text, or use the tokenizer that belongs to the model",
    # processors/video.py
    "set nframes or fps in the item to sample frames",
    "select fewer with nframes or max_frames, or shrink the video",
    "pass one of the two",
    "expected at most {} frames, since the folder's do_sample_frames is false and all",
    "set nframes instead",
    "set nframes or fps instead",
    # processors/views.py
    "leave it out or pass []",
    "write [{}]",
    "write […]",
    "pass single frames as images",
    "pass one pair",
    "remove the key from the item",
    # data/array_records.py
    "{}: an ArrayRecord file that is cut off or damaged; write it again",
    # data/conversations.py
    "config.data.train_path: config.data.mixture names the training files; set it to None",
    "set evaluation_path instead",
    "Repair or remove them, or raise the limit.",
    "name the training file, or set config.data.mixture",
    # data/digits.py
    "config.data.task_weights: no task has a weight above 0; set one of ",
    # data/loader.py
    "resize the images and pad the rows to one size",
    "set it to a positive multiple of {}",
    # data/media.py
    "download it and name the file",
    # data/packing.py
    "Raise the key, lower config.token_budget, or remove the samples; samples are never",
    "{}: window {} has {} rows, but its file name has {}: the data changed with the same",
    "{}: window {} has files for {} and for {} rows; remove the folder",
    # data/pages.py
    "set it to {} or less, or enlarge page_size",
    # data/parquet.py
    "pip install 'vlm_jax[parquet]', or write the rows as JSONL",
    # data/scans.py
    "install it: pip install scikit-learn",
    # data/schemas.py
    "both '{}' and '{}' are given; keep one",
    "give all in items, or all in '{}s'",
    "remove it, since files without placeholders come first",
    "unknown key '{}'; did you mean '{}'?",
    'write {{"type": "{}"}} items instead',
    # data/spelling.py
    "rename it to one of {}, name it in config.data.columns, or remove it",
    "both '{}' (config.data.columns.{}) and '{}' are given; keep one",
    # data/stores.py
    "convert it: iconv -f {} -t UTF-8 FILE > NEW",
    "write one array, or one object a line",
    "write one object a line, or a JSON array of them",
    "write one a line",
    "name a file of records{}",
    # data/tar_members.py
    "{}: a tar that is cut off or damaged: {}; write it again",
    # analysis/attention_distance.py
    "pass the grid of the images that the weights were computed from",
    # analysis/token_maps.py
    "pass the grid of the features that token_maps was called with",
    # budget.py
    "config.token_budget: {} tokens are {}; nearest feasible: {}",
    # checkpoints/arrays.py
    "{}: not a complete Orbax checkpoint; write it again",
    "{} in {} cannot be read ({}); write it again",
    # checkpoints/hub.py
    "Convert it once if you trust it: tensors = torch.load(FILE, map_location='cpu',",
    "download it again",
    "pass the path of the file, or the {} that lists the shards",
    "download the repository elsewhere and pass the path of its folder",
    "download them again:\n  ",
    "fetch it with `git lfs pull`",
    "write it again with one array of each name",
    "Convert it once if you trust it: numpy.load(FILE, allow_pickle=True), then",
    "write the file again",
    # checkpoints/orbax.py
    "free space or fix the permissions, and rerun the same command to resume",
    "train that run to its end first",
    "Delete the folder {} and run the same command; {}. Reported: {}",
    # checkpoints/peft.py
    "Merge it with peft (merge_and_unload) and load the merged model",
    "{} is not empty: write to another folder",
    "take it out of config.lora.target, or export the run as a whole release",
    # checkpoints/release.py
    "save the parameters as a run does, or load the release without the replacement",
    # checkpoints/runs.py
    "train with config.lora, or export it whole",
    # checkpoints/saving.py
    "cast to a numeric dtype",
    "write to another folder, or remove the old checkpoint",
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
    # generation/text.py
    "{}: expected a list of strings, got the string {}; pass [{}]",
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
    # models/two_tower.py
    "set its `pooling`",
    "set projection_dim of both to one number",
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
