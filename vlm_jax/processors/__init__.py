"""Host-side preparation: pictures and text to the arrays of a batch, and a model's text to boxes.

`vqa.VqaProcessor` makes rows of `data` samples; `views`, `layout_tokenizer` and `layout` are its parts.

`system.Processor` makes batches of conversations for released systems; `prompt` and `turns` spell them, over
`tokenizer` and `chat` or `templates`, and `learned` says what of them is trained; `square`, `anyres`, `tiles` and
`native` look at their pictures, each as its releases do (`seen` says what they have in common); `video` reads files.
`grounding`, `list_format` and `boxes` read what a model says of places.
"""
