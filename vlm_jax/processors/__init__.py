"""Host-side preparation: pictures and text to the arrays of a batch, and a model's text to boxes.

`vqa.VqaProcessor` makes rows of `data` samples; `views`, `tokenizer` and `layout` are its parts;
`boxes` writes and reads Qwen-VL's box syntax.
"""
