"""Host-side preprocessing: images and text to the arrays of a batch, and a model's text to boxes.

`processor.Processor` makes rows and batches of conversations for every system. `prompt`, `spelled_prompt` and
`plain_prompt` tokenize them with `tokenizer` and `chat` or `templates`, and `learned` computes the trained tokens.
`square`, `anyres`, `tiles` and `native` preprocess images, each as in its releases, with the protocol of `views`;
`video` reads files. `layout` writes rows, and `reduction` adds the inputs of a token reducer. `image_text` is for
two-tower models and classifiers. `grounding`, `list_format` and `boxes` parse boxes in a model's text.
"""
