"""The GPT-2 of Hugging Face's transformers, in Flax, from random weights, on characters."""

import argparse

from tasks import Task, text

try:
    from transformers import FlaxGPT2LMHeadModel, GPT2Config
except ImportError as error:
    raise SystemExit(f"{error}. Flax models need: pip install 'transformers>=4.57,<5'") from None

OPTIONS = {
    "width": (512, "of the model"),
    "layers": (1, "blocks"),
    "heads": (8, "of the attention"),
    "sequence": (128, "characters of a window"),
    "batch": (8, "windows of a step, of the reference"),
    "steps": (100, "of the reference"),
}
LEARNING_RATE = 5e-4
PRESETS = {"short": {}, "long": {"steps": 300}}
add_arguments = text.add_arguments


def load(options: argparse.Namespace) -> Task:
    """The task of these options."""
    model = FlaxGPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.VOCABULARY,
            n_positions=options.sequence,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
        ),
        _do_init=False,
    )
    return text.task(
        options,
        lambda key, tokens: model.init_weights(key, tokens.shape),
        lambda params, tokens: model(tokens, params=params).logits,  # without dropout
        exact=("transformer/wte/embedding",),  # the head's kernel, too
    )
