"""model/backbone.py: what a backbone says of itself, and which ones are refused."""

from types import SimpleNamespace

import pytest
import transformers
from tiny import SMALL

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.backbone import rope_follows_length


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.PhiConfig(**{key: value for key, value in SMALL.items() if key != "head_dim"}), "bias"),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling"),
    ],
)
def test_backbones_whose_logits_are_something_else_are_refused(config, message):
    backbone = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInput, match=message):
        MedusaModel.from_backbone(backbone, MedusaConfig())


def test_rope_that_follows_the_length():
    yarn, dynamic = ({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} for kind in ("yarn", "dynamic"))
    for parameters, follows in (
        (yarn, False),
        (dynamic, True),
        ({"full": yarn, "sliding": dynamic}, True),
        (None, False),
    ):
        assert rope_follows_length(SimpleNamespace(rope_parameters=parameters)) is follows
