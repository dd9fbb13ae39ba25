"""Host-side preparation: pictures and text to the arrays of a batch, and a model's text to boxes.

`processor.Processor` makes rows and batches of conversations for every system. `prompt`, `spelled_prompt` and
`plain_prompt` spell them, over `tokenizer` and `chat` or `templates`, and `learned` says which tokens are trained.
`square`, `anyres`, `tiles` and `native` prepare pictures, each as its releases do, under the one protocol of `views`;
`video` reads files. `layout` writes rows, and `reduction` adds what a token reducer needs of them. `image_text` is for
two towers and classifiers. `grounding`, `list_format` and `boxes` read what a model says of places.
"""
