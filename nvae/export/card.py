"""The model card: what the weights are, what they were trained on, how to use them."""

import re
from typing import Any

from nvae.command_line import brief
from nvae.models import HierarchicalVAE
from nvae.models.likelihoods import LIKELIHOODS


def model_card(model: HierarchicalVAE, run_config: dict[str, Any] | None = None) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        model: the weights' network.
        run_config: of the run that trained it, where that is known.
    """
    front = "---\nlibrary_name: nvae\npipeline_tag: unconditional-image-generation\n"
    front += "tags:\n- nvae\n- variational-autoencoder\n---\n"
    parts = [front, *_network(model), *_training(run_config or {}), _USE]
    return "\n".join(parts)


def _network(model: HierarchicalVAE) -> list[str]:
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{config.image_size} x {config.image_size}"
    colour = {1: "grey", 3: "colour"}.get(config.image_channels, f"{config.image_channels}-channel")
    groups = ", ".join(str(n) for n in model.groups_per_scale[::-1])
    facts = {
        "images": f"{size}, {colour}, {config.bits} bits",
        "parameters": f"{parameters:,}",
        "latent groups, fine to coarse": groups,
        "latent channels of a group": str(model.latent_channels),
        "likelihood": LIKELIHOODS[config.likelihood].title,
    }
    return [
        "# Deep hierarchical VAE (NVAE)\n",
        "A deep hierarchical variational autoencoder after [Vahdat & Kautz, NeurIPS 2020]"
        "(https://arxiv.org/abs/2007.03898), trained with the `nvae` package.\n",
        _table(facts),
        "`config.json` has every setting of the network.\n",
    ]


def _training(run: dict[str, Any]) -> list[str]:
    data, trainer = (
        value if isinstance(value := run.get(name), dict) else {} for name in ("data", "trainer")
    )
    facts = {
        "run": run.get("name"),
        "data set": data.get("name"),
        "its licence": data.get("licence"),
        "its source": data.get("citation") or data.get("homepage"),
        "training images": data.get("train_size"),
        "epochs": trainer.get("max_epochs"),
        "batch": data.get("batch_size"),
        "seed": run.get("seed"),
    }
    known = {name: _cell(value) for name, value in facts.items() if value not in (None, "")}
    if not known:
        return ["## Training\n", "The checkpoint does not say what it was trained on.\n"]
    return ["## Training\n", _table(known)]


def _cell(value: Any) -> str:
    """Text of a configuration, which may be anybody's: no markup, and it must not end the table."""
    return re.sub(r"([\\`*_\[\]!|])", r"\\\1", brief(value, 300)).replace("<", "&lt;")


def _table(facts: dict[str, str]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


_USE = """## Use

```python
from nvae.checkpoint import load_model

model = load_model("FOLDER")  # this folder
images = model.sample(16, temperature=0.7)  # (16, C, H, W) in [0, 1]
```

`nvae.hub.HubNVAE.from_pretrained` reads it too. `sampler.pt2`, where present, needs torch alone;
`sampler.json` says what it takes.
"""
